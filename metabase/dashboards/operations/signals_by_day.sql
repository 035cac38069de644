SELECT day, coalesce(sum(signals) FILTER (WHERE decision = 'taken'), 0)::bigint AS taken,
    coalesce(sum(signals) FILTER (WHERE reason = 'bar came too late'), 0)::bigint AS too_late
FROM bi.decisions
WHERE run = coalesce([[{{run}}, ]](SELECT run FROM bi.newest_session))
    [[AND symbol = {{symbol}}]]
    [[AND day >= {{first_day}}]]
    [[AND day <= {{last_day}}]]
GROUP BY day ORDER BY day
