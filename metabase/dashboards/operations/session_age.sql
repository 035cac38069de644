SELECT extract(epoch FROM now() - last_bar)::float8 / 3600 AS hours FROM bi.sessions
WHERE run = coalesce([[{{run}}, ]](SELECT run FROM bi.newest_session)) AND last_bar IS NOT NULL
