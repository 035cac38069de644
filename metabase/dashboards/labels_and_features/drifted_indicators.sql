WITH chosen AS (
    SELECT *, max(month) OVER () AS newest FROM bi.indicator_drift
    WHERE shift IS NOT NULL
        [[AND symbol = {{symbol}}]]
        [[AND month >= date_trunc('month', {{first_day}}::timestamp)]]
        [[AND month <= {{last_day}}]]
)
SELECT indicator, avg(shift) AS mean_shift, max(abs(shift)) AS largest_shift,
    count(*) FILTER (WHERE abs(shift) > 0.5) AS symbols_shifted, count(*) AS symbols
FROM chosen WHERE month = newest
GROUP BY indicator ORDER BY abs(avg(shift)) DESC
