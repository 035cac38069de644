SELECT day, kind, count(*) AS events FROM bi.session_events
WHERE run = coalesce([[{{run}}, ]](SELECT run FROM bi.newest_session))
    [[AND symbol = {{symbol}}]]
    [[AND day >= {{first_day}}]]
    [[AND day <= {{last_day}}]]
GROUP BY day, kind ORDER BY day, kind
