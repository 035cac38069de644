SELECT symbol, side, entry_time, exit_time, exit_reason, bars_held, notional, expected_return, realized_return, pnl
FROM bi.trades
WHERE run = coalesce([[{{run}}, ]](SELECT run FROM bi.newest_session)) AND NOT is_open
    [[AND symbol = {{symbol}}]]
    [[AND side = {{side}}]]
    [[AND entry_day >= {{first_day}}]]
    [[AND entry_day <= {{last_day}}]]
ORDER BY exit_time DESC, symbol LIMIT 500
