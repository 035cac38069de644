SELECT month, count(*) AS symbols, sum(bars - flat)::float8 / sum(bars + missing)::float8 AS usable,
    min(usable) AS usable_worst
FROM bi.coverage
WHERE true
    [[AND symbol = {{symbol}}]]
    [[AND month >= date_trunc('month', {{first_day}}::timestamp)]]
    [[AND month <= {{last_day}}]]
GROUP BY month ORDER BY month
