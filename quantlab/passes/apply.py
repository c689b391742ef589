"""Bind the passes of a recipe to their algorithms: one weight in, the changed weight and what it cost out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from quantlab.algorithms.magnitude import magnitude_mask
from quantlab.algorithms.rtn import Grid, rtn
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.recipe.schema import Prune, Quantize
from quantlab.recipe.schemes import SCHEMES

_CLIP_STEPS, _CLIP_FLOOR = 20, 0.6
_DEFAULT_GRID: dict[int, Grid] = {4: "signed", 8: "absmax"}


@dataclass(frozen=True)
class WeightReport:
    """What the passes did to one weight.

    Attributes:
        relative_error: Frobenius norm of the change over that of the weight.
        sparsity: share of weights that are zero now.
    """

    relative_error: float
    sparsity: float


def apply_passes(
    W: Tensor, passes: Sequence[Prune | Quantize], *, dtype: torch.dtype
) -> tuple[Tensor | QuantizedMatrix, WeightReport]:
    """Change one weight.

    Args:
        W: [N, K] of any floating dtype, finite.
        passes: at least one, in order; a quantize pass comes last.
        dtype: what the weight, or its scales, will be stored in.

    Returns:
        The weight in `dtype` or on its integer grid, and the report.
    """
    result: Tensor | QuantizedMatrix = W
    for step in passes:
        assert isinstance(result, Tensor), "nothing follows a quantize pass"
        match step:
            case Prune():
                result = result.masked_fill(magnitude_mask(result, ratio=step.prune), 0)
            case Quantize():
                result = _quantize(result, step, dtype)
            case _:
                assert_never(step)
    if isinstance(result, Tensor):
        result = result.to(dtype)
    return result, _report(W, result)


def _quantize(W: Tensor, step: Quantize, dtype: torch.dtype) -> QuantizedMatrix:
    scheme, algorithm = SCHEMES[step.quantize], step.algorithm
    return rtn(
        W,
        bits=scheme.bits,
        group_size=scheme.group_size,
        scale_dtype=dtype,
        grid=algorithm.grid or _DEFAULT_GRID[scheme.bits],
        clip_steps=_CLIP_STEPS if algorithm.clip == "mse" else 0,
        clip_floor=_CLIP_FLOOR,
    )


def _report(W: Tensor, result: Tensor | QuantizedMatrix) -> WeightReport:
    """Numbers rounded to four digits: they are for people, and stay the same whatever order sums are taken in."""
    before = W.to(torch.float32)
    after = result.dequantize(torch.float32) if isinstance(result, QuantizedMatrix) else result.to(torch.float32)
    norm = before.norm().item()
    error = (after - before).norm().item() / norm if norm else 0.0
    zeros = 1 - after.count_nonzero().item() / after.numel()
    return WeightReport(relative_error=float(f"{error:.4g}"), sparsity=float(f"{zeros:.4g}"))
