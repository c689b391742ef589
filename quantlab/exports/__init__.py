"""One artifact in the formats of other programs, from the same integers: no value is rounded again."""
