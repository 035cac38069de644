SELECT symbol, side, entry_time, entry_price, notional_left, stop_loss, stop_distance, pnl_at_stop, targets_filled,
    bars_held, price_time, price, pnl_now
FROM bi.open_positions
WHERE run = coalesce([[{{run}}, ]](SELECT run FROM bi.newest_session))
    [[AND symbol = {{symbol}}]]
    [[AND side = {{side}}]]
    [[AND entry_day >= {{first_day}}]]
    [[AND entry_day <= {{last_day}}]]
ORDER BY pnl_at_stop
