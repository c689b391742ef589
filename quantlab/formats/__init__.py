"""Layouts: how the tensors of a number format are stored and described in config.json. The plan needs no torch here."""
