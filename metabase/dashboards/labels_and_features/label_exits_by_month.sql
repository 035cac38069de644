SELECT month, exit_reason, sum(trades)::float8 / sum(sum(trades)) OVER (PARTITION BY month)::float8 AS share
FROM bi.label_exits
WHERE true
    [[AND symbol = {{symbol}}]]
    [[AND side = {{side}}]]
    [[AND month >= date_trunc('month', {{first_day}}::timestamp)]]
    [[AND month <= {{last_day}}]]
GROUP BY month, exit_reason ORDER BY month, exit_reason
