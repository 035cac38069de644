SELECT month, sum(forecasts)::bigint AS forecasts, sum(predicted_sum) / sum(forecasts) AS expected,
    sum(realised_sum) / sum(forecasts) AS realised,
    sum(realised_sum) FILTER (WHERE decile = 10) / sum(forecasts) FILTER (WHERE decile = 10) AS realised_top_tenth
FROM bi.forecast_bins
WHERE model_id = coalesce([[{{model}}, ]](SELECT model_id FROM bi.present_model))
    [[AND symbol = {{symbol}}]]
    [[AND side = {{side}}]]
    [[AND month >= date_trunc('month', {{first_day}}::timestamp)]]
    [[AND month <= {{last_day}}]]
GROUP BY month ORDER BY month
