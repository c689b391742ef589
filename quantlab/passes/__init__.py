"""Binds the passes of a recipe to their algorithms: weights and statistics in, changed weights out."""
