"""Loads checkpoints as transformers models that compute on packed weights, and decodes from them.

Entry points for other packages: `load` (artifacts and checkpoints), `twin` (models with random weights), `decode`
(decoding with a KV cache of fixed size), `device`, `inventory` (bytes of weights, fallbacks), `cache_arguments`,
`cpu_operators`. Inside: `modules` (what replaces transformers' modules), `banks` (packed and dense matrices),
`decoding` (fused decode steps), `native` (CPU kernels in C) and `cuda` (kernels in Triton and Gluon), which only these
three folders and `cpu_operators` import.
"""
