SELECT month, side, sum(return_sum) / nullif(sum(trades), 0)::float8 AS mean_return
FROM bi.label_months
WHERE true
    [[AND symbol = {{symbol}}]]
    [[AND side = {{side}}]]
    [[AND month >= date_trunc('month', {{first_day}}::timestamp)]]
    [[AND month <= {{last_day}}]]
GROUP BY month, side HAVING sum(trades) > 0 ORDER BY month, side
