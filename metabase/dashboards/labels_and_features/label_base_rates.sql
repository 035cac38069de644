SELECT symbol, side, sum(trades)::bigint AS trades, sum(return_sum) / sum(trades)::float8 AS mean_return,
    sum(profits)::float8 / sum(trades)::float8 AS in_profit, sum(ambiguous)::float8 / sum(trades)::float8 AS ambiguous
FROM bi.label_months
WHERE true
    [[AND symbol = {{symbol}}]]
    [[AND side = {{side}}]]
    [[AND month >= date_trunc('month', {{first_day}}::timestamp)]]
    [[AND month <= {{last_day}}]]
GROUP BY symbol, side HAVING sum(trades) > 0 ORDER BY mean_return DESC
