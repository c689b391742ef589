"""Quality on held-out text: perplexity, KL divergence and agreement with the baseline, per token and per layer."""
