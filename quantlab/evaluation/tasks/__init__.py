"""Tasks: our offline tasks and those of lm-evaluation-harness, and their scores."""
