"""Other programs judge an artifact: each loads it in an environment of its own and computes the same tokens."""
