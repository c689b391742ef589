"""The served path: an artifact decoded in 16 bits, step by step, against its own float32 logits and the baseline's."""
