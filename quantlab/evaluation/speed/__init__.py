"""Speed: prefill and decode tokens per second, and the rates of a record computed from several processes."""
