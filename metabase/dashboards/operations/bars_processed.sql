SELECT bars FROM bi.sessions WHERE run = coalesce([[{{run}}, ]](SELECT run FROM bi.newest_session))
