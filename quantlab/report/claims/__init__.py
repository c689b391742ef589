"""Published claims checked against the matrix."""
