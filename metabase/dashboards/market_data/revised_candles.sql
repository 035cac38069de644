SELECT symbol, open_time, noticed_at, close_before, close_after, close_moved_bps FROM bi.revisions
WHERE true
    [[AND symbol = {{symbol}}]]
    [[AND day >= {{first_day}}]]
    [[AND day <= {{last_day}}]]
ORDER BY noticed_at DESC, symbol, open_time LIMIT 100
