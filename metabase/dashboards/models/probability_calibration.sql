SELECT sum(probability_sum) / sum(forecasts)::float8 AS given, sum(profits)::float8 / sum(forecasts)::float8 AS in_profit,
    sum(forecasts)::bigint AS forecasts
FROM bi.forecast_bins
WHERE model_id = coalesce([[{{model}}, ]](SELECT model_id FROM bi.present_model)) AND probability_bin > 0
    [[AND symbol = {{symbol}}]]
    [[AND side = {{side}}]]
    [[AND month >= date_trunc('month', {{first_day}}::timestamp)]]
    [[AND month <= {{last_day}}]]
GROUP BY probability_bin ORDER BY probability_bin
