WITH chosen AS (
    SELECT *, max(month) OVER () AS newest FROM bi.indicator_drift
    WHERE shift IS NOT NULL
        [[AND symbol = {{symbol}}]]
        [[AND month >= date_trunc('month', {{first_day}}::timestamp)]]
        [[AND month <= {{last_day}}]]
)
SELECT symbol, avg(abs(shift)) AS mean_shift FROM chosen WHERE month = newest
GROUP BY symbol ORDER BY mean_shift DESC
