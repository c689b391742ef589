"""The routed experts of a layer on a CUDA device: four kernel launches for any routing, without host synchronization.

A single token needs no sorting, which leaves three. Quantizing activations to int8 adds one launch before each product.
"""

from typing import Final

import torch
from torch import Tensor

from quantlab.runtime.banks.choice import Matrices
from quantlab.runtime.banks.dense import DenseMatrices
from quantlab.runtime.cuda.banks import CudaMatrices
from quantlab.runtime.cuda.layout import BLOCK, SLAB
from quantlab.runtime.cuda.tiles import Kind, expert_tiles

_ROWS_AT_ONCE: Final = 32768
"""Rows (tokens times experts per token) computed at once: bounds the size of the intermediate activations."""


def takes(gate_up: Matrices, down: Matrices, dtype: torch.dtype) -> bool:
    """Whether `routed` supports the experts of these banks on a CUDA device, for activations of this dtype."""
    fits = [
        isinstance(bank, CudaMatrices) or (isinstance(bank, DenseMatrices) and bank.weight.dtype == dtype)
        for bank in (gate_up, down)
    ]
    return dtype in {torch.float16, torch.bfloat16} and all(fits) and gate_up.shape[1] % (2 * SLAB) == 0


def routed(
    gate_up: Matrices,
    down: Matrices,
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    added: Tensor | None = None,
) -> Tensor:
    """``sum_k w_k down_k(silu(gate_k(x)) * up_k(x))`` over the experts of each token.

    Args:
        gate_up: bank of E matrices [2I, H], the gate's rows first.
        down: bank of E matrices [H, I].
        x: [tokens, H].
        top_k_index: [tokens, k], the experts of each token.
        top_k_weights: [tokens, k], their weights.
        added: [tokens, H], added to the sum.

    Returns:
        [tokens, H] in the dtype of x; summed in float32.
    """
    tokens, top_k = top_k_index.shape
    if not top_k_index.numel():
        return torch.zeros_like(x) if added is None else added.clone()
    step = max(_ROWS_AT_ONCE // top_k, 1)
    if tokens > step:
        parts = [slice(start, start + step) for start in range(0, tokens, step)]
        more = [None if added is None else added[part] for part in parts]
        return torch.cat(
            [
                routed(gate_up, down, x[part], top_k_index[part], top_k_weights[part], one)
                for part, one in zip(parts, more, strict=True)
            ]
        )
    from quantlab.runtime.cuda import launch

    first, second = _on_device(gate_up), _on_device(down)
    experts = gate_up.shape[0]
    per_expert = top_k_index.numel() / experts
    cuts = expert_tiles([first.kind, second.kind], per_expert, launch.chip(x.device))
    rows = launch.route(top_k_index, experts, cuts[0].tokens)
    x_of = _quantized(first.kind, x.contiguous())
    hidden = launch.run_product(first, *x_of, cuts[0], dtype=x.dtype, routed=rows, gated=True)
    outputs = launch.run_product(second, *_quantized(second.kind, hidden), cuts[1], dtype=x.dtype, routed=rows)
    return launch.combine(outputs, top_k_weights, added)


def _on_device(bank: Matrices):  # type: ignore[no-untyped-def]  # noqa: ANN202 - triton is imported late
    from quantlab.runtime.cuda import launch

    if isinstance(bank, CudaMatrices):
        return bank.on_device()
    assert isinstance(bank, DenseMatrices), "checked by `takes`"
    return launch.Matrices(Kind.FLOAT, bank.shape, BLOCK, bank.weight, bank.weight, bank.arrived)


def _quantized(kind: Kind, x: Tensor) -> tuple[Tensor, Tensor | None]:
    from quantlab.runtime.cuda import launch

    return launch.quantize_tokens(x, early=True) if kind == Kind.INT8_TOKENS else (x, None)
