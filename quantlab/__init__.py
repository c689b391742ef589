"""Quantizes, prunes and converts DeepSeek checkpoints, and measures the variants. quantlab/README.md is the map."""
