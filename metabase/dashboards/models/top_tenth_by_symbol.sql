SELECT symbol, (sum(forecasts) FILTER (WHERE decile = 10))::bigint AS forecasts,
    sum(realised_sum) FILTER (WHERE decile = 10) / sum(forecasts) FILTER (WHERE decile = 10)
    - sum(realised_sum) / sum(forecasts) AS gain
FROM bi.forecast_bins
WHERE model_id = coalesce([[{{model}}, ]](SELECT model_id FROM bi.present_model))
    [[AND symbol = {{symbol}}]]
    [[AND side = {{side}}]]
    [[AND month >= date_trunc('month', {{first_day}}::timestamp)]]
    [[AND month <= {{last_day}}]]
GROUP BY symbol HAVING sum(forecasts) FILTER (WHERE decile = 10) > 0 ORDER BY gain DESC
