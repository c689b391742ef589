"""The plan: recipe x headers x family to the outcome of every tensor. Needs no torch."""
