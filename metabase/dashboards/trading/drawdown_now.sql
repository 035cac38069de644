SELECT drawdown FROM bi.equity_curve WHERE run = coalesce([[{{run}}, ]](SELECT run FROM bi.newest_session)) ORDER BY time DESC LIMIT 1
