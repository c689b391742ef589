"""Modules that replace those of transformers: linears, gated MLPs, experts, norms and attention.

`build` makes a model of them. Names of the attention implementations are in `attention.IMPLEMENTATIONS`.
"""
