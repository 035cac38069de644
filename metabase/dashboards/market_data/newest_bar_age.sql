SELECT min(hours_old) AS hours FROM bi.freshness
WHERE true
    [[AND symbol = {{symbol}}]]
HAVING count(*) > 0
