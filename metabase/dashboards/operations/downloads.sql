SELECT symbol, newest_bar, hours_old, bars_not_fetched, bars_rejected, bars_revised, exchange_status, rules_fetched_at
FROM bi.freshness
WHERE true
    [[AND symbol = {{symbol}}]]
ORDER BY bars_not_fetched DESC, hours_old DESC, symbol
