SELECT coalesce(sum(bars), 0)::bigint AS bars FROM bi.coverage
WHERE true
    [[AND symbol = {{symbol}}]]
    [[AND month >= date_trunc('month', {{first_day}}::timestamp)]]
    [[AND month <= {{last_day}}]]
