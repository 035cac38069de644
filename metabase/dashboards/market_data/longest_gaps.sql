SELECT symbol, first_missing, last_missing, bars, hours, cause, reason FROM bi.gaps
WHERE cause <> 'not_listed_yet'
    [[AND symbol = {{symbol}}]]
    [[AND day >= {{first_day}}]]
    [[AND day <= {{last_day}}]]
ORDER BY bars DESC, symbol, first_missing LIMIT 100
