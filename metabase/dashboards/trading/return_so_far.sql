SELECT total_return FROM bi.sessions WHERE run = coalesce([[{{run}}, ]](SELECT run FROM bi.newest_session)) AND total_return IS NOT NULL
