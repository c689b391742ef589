"""Weights on their way through a run: finite when read, and within what their stored dtype can hold when written."""

import torch
from torch import Tensor

from quantlab.errors import CheckpointError
from quantlab.formats.stored import StoredWeights
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.plan.model import Step


def read_finite(step: Step, source: StoredWeights) -> Tensor:
    """The source weight of a step.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    weight = source.read(step.claim.name)
    assert isinstance(weight, Tensor), "the plan refuses sources on integer grids"
    if not is_finite(weight):
        raise CheckpointError(
            "a weight is not finite",
            where=f"{step.source.file}, {step.claim.name}",
            found=f"{int((~weight.isfinite()).sum())} values are NaN or infinite",
            fix="download the shard again; if it stays so, the checkpoint itself is broken",
        )
    return weight


def is_finite(weight: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity: one pass, no temporaries, since both show in the extremes."""
    if weight.numel() == 0 or not weight.is_floating_point():
        return True
    low, high = weight.aminmax()
    return bool(low.isfinite() and high.isfinite())


def check_range(step: Step, weight: Tensor, changed: Tensor | QuantizedMatrix) -> None:
    """Refuse what the dtype of the result cannot hold: values or scales that became infinite, groups that became zero."""
    values = changed.scale if isinstance(changed, QuantizedMatrix) else changed
    if not is_finite(values):
        extreme, edge = weight.abs().max().item(), torch.finfo(values.dtype).max
        problem, found = "overflows", f"largest magnitude {extreme:.4g}; {step.dtype} ends at {edge:.4g}"
    elif isinstance(changed, QuantizedMatrix) and lost_groups(weight, changed):
        problem, found = (
            "underflows",
            f"{lost_groups(weight, changed)} scales are too small for {step.dtype}: their weights would all become zero",
        )
    else:
        return
    raise CheckpointError(
        f"a weight {problem} the dtype it is stored in",
        where=f"{step.source.file}, {step.claim.name}",
        found=found,
        fix="cast to bfloat16 instead" if step.dtype == "F16" else "leave it out with `ignore`",
    )


def lost_groups(weight: Tensor, matrix: QuantizedMatrix) -> int:
    """How many groups became zero because their scale is too small to store; groups that were pruned away do not count."""
    if matrix.block is not None:
        return 0  # float32 scales hold every 16-bit weight
    rows, groups = matrix.scale.shape
    finfo = torch.finfo(matrix.scale.dtype)
    largest = weight.view(rows, groups, -1).abs().amax(dim=2).to(torch.float32)
    too_small = (largest > 0) & (largest <= finfo.smallest_normal * finfo.eps * (1 << matrix.bits))
    steps = matrix.q.view(rows, groups, -1)
    if matrix.zero is not None:
        steps = steps - matrix.zero[:, :, None]
    return int((too_small & ~steps.any(dim=2)).sum())
