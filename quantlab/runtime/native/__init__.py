"""Matrix products, attention, routing and row-wise operations for CPUs with AVX-512: C sources, their build and Python bindings."""
