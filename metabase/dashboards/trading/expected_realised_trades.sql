SELECT expected_return, realized_return, symbol
FROM bi.trades
WHERE run = coalesce([[{{run}}, ]](SELECT run FROM bi.newest_session)) AND NOT is_open AND expected_return IS NOT NULL
    [[AND symbol = {{symbol}}]]
    [[AND side = {{side}}]]
    [[AND entry_day >= {{first_day}}]]
    [[AND entry_day <= {{last_day}}]]
ORDER BY entry_time DESC LIMIT 1000
