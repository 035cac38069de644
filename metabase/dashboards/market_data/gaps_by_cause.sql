SELECT month, cause, sum(bars)::bigint AS bars
FROM bi.gap_months
WHERE cause <> 'not_listed_yet'
    [[AND symbol = {{symbol}}]]
    [[AND month >= date_trunc('month', {{first_day}}::timestamp)]]
    [[AND month <= {{last_day}}]]
GROUP BY month, cause ORDER BY month, cause
