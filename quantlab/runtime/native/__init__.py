"""Native kernels for CPUs with AVX-512, in C: sources, build, Python bindings and the replay of recorded calls."""
