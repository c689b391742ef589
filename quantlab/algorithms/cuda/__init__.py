"""Triton kernels for the sequential inner loops of GPTQ and of coordinate descent."""
