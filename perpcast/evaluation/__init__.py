"""Honest scores: splits in time, baselines, metrics with intervals, the decision threshold, pictures and the report.

No Keras here, and no SQL: arrays in, numbers and pages out.
"""
