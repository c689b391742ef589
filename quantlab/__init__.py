"""Quantizes, prunes and converts DeepSeek checkpoints, and measures the variants side by side. quantlab/README.md is the map."""
