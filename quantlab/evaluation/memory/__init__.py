"""Memory: bytes on disk, bytes of loaded weights, peaks, and the cost of long contexts by attention implementation."""
