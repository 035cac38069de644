"""Dashboards as code: the questions, the same pictures without Metabase, and what brings them into one."""
