SELECT sum(bars - flat)::float8 / sum(bars + missing)::float8 AS usable FROM bi.coverage
WHERE true
    [[AND symbol = {{symbol}}]]
    [[AND month >= date_trunc('month', {{first_day}}::timestamp)]]
    [[AND month <= {{last_day}}]]
HAVING sum(bars + missing) > 0
