SELECT count(*) AS events FROM bi.session_events
WHERE run = coalesce([[{{run}}, ]](SELECT run FROM bi.newest_session)) AND kind IN ('fetch_failed', 'late_candle', 'bars_missing', 'not_predicted', 'entry_cancelled')
    [[AND symbol = {{symbol}}]]
    [[AND day >= {{first_day}}]]
    [[AND day <= {{last_day}}]]
