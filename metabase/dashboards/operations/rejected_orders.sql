SELECT reason, leg, count(*) AS orders, max(created_at) AS last_time FROM bi.orders
WHERE run = coalesce([[{{run}}, ]](SELECT run FROM bi.newest_session)) AND status = 'rejected'
    [[AND symbol = {{symbol}}]]
    [[AND day >= {{first_day}}]]
    [[AND day <= {{last_day}}]]
GROUP BY reason, leg ORDER BY orders DESC, reason, leg
