SELECT leg, count(*) AS fills, avg(slippage_bps) AS mean_bps,
    percentile_cont(0.5) WITHIN GROUP (ORDER BY slippage_bps) AS median_bps,
    percentile_cont(0.95) WITHIN GROUP (ORDER BY slippage_bps) AS worst_twentieth_bps, sum(slippage_usdt) AS cost_usdt
FROM bi.slippage
WHERE run = coalesce([[{{run}}, ]](SELECT run FROM bi.newest_session)) AND origin = 'paper'
    [[AND symbol = {{symbol}}]]
    [[AND side = {{side}}]]
    [[AND day >= {{first_day}}]]
    [[AND day <= {{last_day}}]]
GROUP BY leg ORDER BY leg
