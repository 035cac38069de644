SELECT month, side, sum(profits)::float8 / sum(trades)::float8 AS in_profit
FROM bi.label_months
WHERE true
    [[AND symbol = {{symbol}}]]
    [[AND side = {{side}}]]
    [[AND month >= date_trunc('month', {{first_day}}::timestamp)]]
    [[AND month <= {{last_day}}]]
GROUP BY month, side HAVING sum(trades) > 0 ORDER BY month, side
