SELECT quantile, sum(with_quantiles)::bigint AS forecasts, sum(below)::float8 / sum(with_quantiles)::float8 AS below,
    sum(within)::float8 / sum(with_quantiles)::float8 AS at_or_below
FROM bi.forecast_bins CROSS JOIN LATERAL (
    VALUES (0.5::float8, below_q50, within_q50), (0.75, below_q75, within_q75), (0.9, below_q90, within_q90)
) AS quantiles(quantile, below, within)
WHERE model_id = coalesce([[{{model}}, ]](SELECT model_id FROM bi.present_model))
    [[AND symbol = {{symbol}}]]
    [[AND side = {{side}}]]
    [[AND month >= date_trunc('month', {{first_day}}::timestamp)]]
    [[AND month <= {{last_day}}]]
GROUP BY quantile HAVING sum(with_quantiles) > 0 ORDER BY quantile
