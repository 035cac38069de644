SELECT run, model_id, first_bar, last_bar, bars, equity, total_return, max_drawdown, trades_closed,
    trades_won::float8 / nullif(trades_closed, 0) AS won, positions_open
FROM bi.sessions
ORDER BY last_bar DESC NULLS LAST, length(run) DESC, run DESC LIMIT 200
