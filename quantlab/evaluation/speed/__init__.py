"""Speed: prefill and decode tokens per second, and their combination over several processes."""
