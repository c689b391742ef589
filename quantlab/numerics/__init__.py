"""Number formats as values, integer grids, FP8 blocks, packing, and statistics of inputs."""
