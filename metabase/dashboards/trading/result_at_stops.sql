SELECT coalesce(sum(pnl_at_stop), 0) AS pnl_at_stops FROM bi.open_positions
WHERE run = coalesce([[{{run}}, ]](SELECT run FROM bi.newest_session))
    [[AND symbol = {{symbol}}]]
    [[AND side = {{side}}]]
