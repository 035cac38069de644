SELECT count(*) AS looks FROM bi.registry_events
WHERE step = 'test_span_looked_at'
    [[AND model_id = {{model}}]]
    [[AND day >= {{first_day}}]]
    [[AND day <= {{last_day}}]]
