"""Packed matrices on CUDA devices: banks, kernels in Triton and Gluon, their launchers, tile sizes, memory layout.

Matrix products are in `kernels` (few rows; stream-K) and `hopper` (many rows, compute capability 9), attention of a
decode step in `attend`, the router in `choose`. `tiles` and `wide_schedule` choose how a product is divided, `launch`
and `launch_step` launch.
"""
