SELECT reason, sum(signals)::bigint AS signals FROM bi.decisions
WHERE run = coalesce([[{{run}}, ]](SELECT run FROM bi.newest_session)) AND decision = 'refused'
    [[AND symbol = {{symbol}}]]
    [[AND day >= {{first_day}}]]
    [[AND day <= {{last_day}}]]
GROUP BY reason ORDER BY signals DESC
