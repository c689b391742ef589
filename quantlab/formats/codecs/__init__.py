"""Codecs: matrices to the stored tensors of a layout and back."""
