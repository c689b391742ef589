"""Measures artifacts into records: one folder per kind of measurement, and the processes that run them."""
