SELECT time, task_kind, step, model_id, other_model, gain_a_day, gain_a_day_lower, reason
FROM bi.registry_events
WHERE step <> 'test_span_looked_at'
    [[AND (model_id = {{model}} OR other_model = {{model}})]]
    [[AND day >= {{first_day}}]]
    [[AND day <= {{last_day}}]]
ORDER BY time DESC, step LIMIT 200
