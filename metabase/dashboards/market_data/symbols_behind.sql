SELECT count(*) FILTER (WHERE hours_behind > 1) AS symbols FROM bi.freshness
WHERE true
    [[AND symbol = {{symbol}}]]
