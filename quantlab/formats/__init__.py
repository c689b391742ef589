"""Layouts: how the tensors of a number format are stored and described in config.json. Needs no torch, except stored.py."""
