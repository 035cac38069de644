SELECT month, avg((abs(shift) > 0.5)::int)::float8 AS shifted, avg(abs(shift)) AS mean_shift
FROM bi.indicator_drift
WHERE shift IS NOT NULL
    [[AND symbol = {{symbol}}]]
    [[AND month >= date_trunc('month', {{first_day}}::timestamp)]]
    [[AND month <= {{last_day}}]]
GROUP BY month ORDER BY month
