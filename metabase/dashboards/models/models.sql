SELECT model_id, task_kind, state, created_at, test_first_day, test_last_day, threshold, verdict
FROM bi.models ORDER BY created_at DESC, model_id LIMIT 100
