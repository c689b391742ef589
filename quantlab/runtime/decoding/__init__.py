"""Fused decode steps.

`fusable_parts` recognizes the parts of a model; `fused_step` computes with them through the kernels of `kernel_interface`.
"""
