"""Loads any supported checkpoint and computes on packed weights; kernels in cuda/ (Triton, Gluon) and native/ (C)."""
