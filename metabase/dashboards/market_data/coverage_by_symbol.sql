SELECT symbol, min(month) AS first_month, max(month) AS last_month, sum(bars)::bigint AS bars,
    sum(missing)::bigint AS missing, sum(flat)::bigint AS flat,
    sum(bars - flat)::float8 / sum(bars + missing)::float8 AS usable,
    (array_agg(month ORDER BY usable, month))[1] AS worst_month, min(usable) AS usable_in_worst
FROM bi.coverage
WHERE true
    [[AND symbol = {{symbol}}]]
    [[AND month >= date_trunc('month', {{first_day}}::timestamp)]]
    [[AND month <= {{last_day}}]]
GROUP BY symbol ORDER BY usable, symbol
