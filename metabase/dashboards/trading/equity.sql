WITH bars AS (
    SELECT time, equity, row_number() OVER (ORDER BY time) - 1 AS number, count(*) OVER () AS bars
    FROM bi.equity_curve
    WHERE run = coalesce([[{{run}}, ]](SELECT run FROM bi.newest_session))
        [[AND day >= {{first_day}}]]
        [[AND day <= {{last_day}}]]
)
SELECT max(time) AS time, (array_agg(equity ORDER BY time DESC))[1] AS equity
FROM bars GROUP BY number / (bars / 1000 + 1) ORDER BY 1
