SELECT decile, sum(forecasts)::bigint AS forecasts, sum(predicted_sum) / sum(forecasts) AS expected,
    sum(realised_sum) / sum(forecasts) AS realised
FROM bi.forecast_bins
WHERE model_id = coalesce([[{{model}}, ]](SELECT model_id FROM bi.present_model))
    [[AND symbol = {{symbol}}]]
    [[AND side = {{side}}]]
    [[AND month >= date_trunc('month', {{first_day}}::timestamp)]]
    [[AND month <= {{last_day}}]]
GROUP BY decile ORDER BY decile
