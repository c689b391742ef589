"""Datasets by name: located, read row by row, rendered by chat templates; shared by calibration and evaluation (no torch)."""
