SELECT symbol, count(*) AS trades, sum(pnl) AS pnl, avg(realized_return) AS mean_return
FROM bi.trades
WHERE run = coalesce([[{{run}}, ]](SELECT run FROM bi.newest_session)) AND NOT is_open
    [[AND symbol = {{symbol}}]]
    [[AND side = {{side}}]]
    [[AND entry_day >= {{first_day}}]]
    [[AND entry_day <= {{last_day}}]]
GROUP BY symbol ORDER BY pnl DESC
