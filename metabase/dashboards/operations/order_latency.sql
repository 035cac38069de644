SELECT day, count(*) AS orders, percentile_cont(0.5) WITHIN GROUP (ORDER BY milliseconds_to_fill) AS median_ms,
    percentile_cont(0.95) WITHIN GROUP (ORDER BY milliseconds_to_fill) AS slowest_twentieth_ms
FROM bi.orders
WHERE run = coalesce([[{{run}}, ]](SELECT run FROM bi.newest_session)) AND order_type = 'Market' AND milliseconds_to_fill IS NOT NULL
    [[AND symbol = {{symbol}}]]
    [[AND day >= {{first_day}}]]
    [[AND day <= {{last_day}}]]
GROUP BY day ORDER BY day
