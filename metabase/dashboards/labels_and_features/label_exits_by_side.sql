SELECT side, exit_reason, sum(trades)::float8 / sum(sum(trades)) OVER (PARTITION BY side)::float8 AS share
FROM bi.label_exits
WHERE true
    [[AND symbol = {{symbol}}]]
    [[AND side = {{side}}]]
    [[AND month >= date_trunc('month', {{first_day}}::timestamp)]]
    [[AND month <= {{last_day}}]]
GROUP BY side, exit_reason ORDER BY side, exit_reason
