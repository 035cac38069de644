SELECT forecast,
    max(value) FILTER (WHERE metric = 'rank_ic') AS rank_ic, max(lower) FILTER (WHERE metric = 'rank_ic') AS rank_ic_lower,
    max(upper) FILTER (WHERE metric = 'rank_ic') AS rank_ic_upper,
    max(value) FILTER (WHERE metric = 'direction') AS direction, max(value) FILTER (WHERE metric = 'mae') AS mae,
    max(value) FILTER (WHERE metric = 'rmse') AS rmse, max(value) FILTER (WHERE metric = 'trade_return') AS trade_return,
    max(lower) FILTER (WHERE metric = 'trade_return') AS trade_return_lower,
    max(upper) FILTER (WHERE metric = 'trade_return') AS trade_return_upper,
    max(value) FILTER (WHERE metric = 'win_rate') AS win_rate, max(value) FILTER (WHERE metric = 'trades') AS trades
FROM bi.model_scores
WHERE model_id = coalesce([[{{model}}, ]](SELECT model_id FROM bi.present_model))
GROUP BY forecast ORDER BY forecast <> 'model', forecast
