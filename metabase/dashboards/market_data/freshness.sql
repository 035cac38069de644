SELECT symbol, hours_behind, newest_bar, exchange_status FROM bi.freshness
WHERE true
    [[AND symbol = {{symbol}}]]
ORDER BY hours_behind DESC, symbol
