SELECT symbol, month, bars, missing, flat, usable FROM bi.coverage
WHERE usable < 1
    [[AND symbol = {{symbol}}]]
    [[AND month >= date_trunc('month', {{first_day}}::timestamp)]]
    [[AND month <= {{last_day}}]]
ORDER BY usable, symbol, month LIMIT 100
