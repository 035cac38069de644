WITH ranked AS (
    SELECT ntile(5) OVER (ORDER BY expected_return) AS fifth, expected_return, realized_return, pnl
    FROM bi.trades
    WHERE run = coalesce([[{{run}}, ]](SELECT run FROM bi.newest_session)) AND NOT is_open AND expected_return IS NOT NULL
        [[AND symbol = {{symbol}}]]
        [[AND side = {{side}}]]
        [[AND entry_day >= {{first_day}}]]
        [[AND entry_day <= {{last_day}}]]
)
SELECT fifth, count(*) AS trades, avg(expected_return) AS expected, avg(realized_return) AS realised,
    avg((pnl > 0)::int)::float8 AS won
FROM ranked GROUP BY fifth ORDER BY fifth
