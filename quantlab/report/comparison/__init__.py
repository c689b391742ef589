"""The comparison of two runs or two records, number by number."""
