"""Tasks: quantlab's offline tasks, the tasks of lm-evaluation-harness, and their scores."""
