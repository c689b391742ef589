"""The weights of a block between source and artifact. The states of a weight:

    read      read once, on first use, and checked to be finite
    edited    experts removed, scales folded in: a function of the source weight, not rounded
    result    the result of the passes: in its stored dtype, or quantized
    popped    handed over to be encoded and written

A weight is held as read until its result replaces it, and the result until it is popped. A block therefore holds at
most one copy of its weights, in the dtype of the source or of the result; without layer edits it holds a single weight.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quantlab.architectures.architecture import ModelTensor
from quantlab.checkpoint.reader import TORCH_DTYPES
from quantlab.errors import CheckpointError
from quantlab.formats.stored import StoredWeights
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.passes.apply import Changed, Group, WeightReport, apply_passes
from quantlab.plan.model import Block, Step

Read = Callable[[Step], Tensor]
"""Reads the source weight of a step."""
Change = Callable[[Tensor], Tensor]
"""Computes an edited weight from the previous one."""
Restructure = Callable[[Mapping[str, Tensor], Mapping[str, ModelTensor]], dict[str, Tensor]]
"""Computes the tensors of a smaller layer from the tensors of a layer and their roles, by name."""


class BlockWeights:
    """The weights of one block.

    Args:
        block: a block of the plan.
        read: reads a source weight.

    Attributes:
        steps: the plan's step for each weight, by name.
    """

    def __init__(self, block: Block, read: Read) -> None:
        self.steps: Mapping[str, Step] = {step.tensor.name: step for shard in block.shards for step in shard.steps}
        self._read = read
        self._sources: dict[str, Tensor] = {}
        self._folds: dict[str, list[Change]] = {}
        self._results: dict[str, Changed] = {}

    def source(self, name: str) -> Tensor:
        """A weight with all edits so far, before passes; in the dtype of the source or, if folded, in float32."""
        assert name not in self._results, f"{name} has been changed"
        if name not in self._sources:
            self._sources[name] = self._read(self.steps[name])
        weight = self._sources[name]
        for change in self._folds.get(name, ()):
            weight = change(weight)
        return weight

    def stored(self, name: str) -> Tensor:
        """A weight that no pass changes, in its stored dtype."""
        return self.source(name).to(TORCH_DTYPES[self.steps[name].dtype])

    def is_rounded(self, name: str) -> bool:
        """Whether `stored` differs from `source`, because the stored dtype is another."""
        return TORCH_DTYPES[self.steps[name].dtype] != self.source(name).dtype

    def fold(self, name: str, change: Change) -> None:
        """Add a fold to a weight."""
        self._folds.setdefault(name, []).append(change)

    def restructure(self, change: Restructure) -> None:
        """Replace the weights that were read and not changed yet by those of a smaller layer."""
        described = {name: self.steps[name].tensor for name in self._sources}
        self._sources = change(self._sources, described)

    def set(self, name: str, weight: Tensor, result: Tensor | QuantizedMatrix, report: WeightReport | None) -> None:
        """Replace a weight by the result of the passes.

        Args:
            name: name of the weight.
            weight: the value of `source`, on the device of the result.
            result: result of the passes.
            report: report on the result; None if no pass changed the weight.

        Raises:
            CheckpointError: the dtype it is stored in cannot hold the result.
        """
        check_range(self.steps[name], weight, result)
        self._results[name] = result.to("cpu"), report
        del self._sources[name]

    def changed(self, name: str) -> bool:
        """Whether the result of a weight is set."""
        return name in self._results

    def pop(self, name: str) -> Changed:
        """Remove and return the result of a weight. A weight without a result is changed now, without statistics.

        Raises:
            CheckpointError: it cannot be read or is not finite, or the dtype it is stored in cannot hold the result.
        """
        if name not in self._results:
            step, dtype = self.steps[name], TORCH_DTYPES[self.steps[name].dtype]
            weight = self.source(name)
            result: Changed = weight.to(dtype), None
            if step.passes:
                result = apply_passes([Group({name: weight})], step.passes, dtype=dtype)[name]
            self.set(name, weight, *result)
        return self._results.pop(name)


def read_finite(step: Step, source: StoredWeights) -> Tensor:
    """Read the source weight of a step.

    Raises:
        CheckpointError: it contains NaN or infinity.
    """
    weight = source.read(step.tensor.name)
    assert isinstance(weight, Tensor), "the plan refuses sources on integer grids"
    if not is_finite(weight):
        raise CheckpointError(
            "a weight is not finite",
            where=f"{step.source.file}, {step.tensor.name}",
            found=f"{int((~weight.isfinite()).sum())} values are NaN or infinite",
            fix="download the shard again; if the error persists, the checkpoint itself is damaged",
        )
    return weight


def is_finite(weight: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity; computed from the extremes, in one pass without temporaries."""
    if weight.numel() == 0 or not weight.is_floating_point():
        return True
    low, high = weight.aminmax()
    return bool(low.isfinite() and high.isfinite())


def check_range(step: Step, weight: Tensor, changed: Tensor | QuantizedMatrix) -> None:
    """Refuse a result that its stored dtype cannot represent.

    Raises:
        CheckpointError: values, scales or their products with the integers became infinite, or scales of nonzero weights
            became zero.
    """
    values = changed.scale if isinstance(changed, QuantizedMatrix) else changed
    if not is_finite(values) or (isinstance(changed, QuantizedMatrix) and not changed.expands_within_range()):
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
        where=f"{step.source.file}, {step.tensor.name}",
        found=found,
        fix="cast to bfloat16 instead" if step.dtype == "F16" else "leave it out with `ignore`",
    )


def lost_groups(weight: Tensor, matrix: QuantizedMatrix) -> int:
    """Number of groups that became zero because their scale is too small for its dtype; pruned groups do not count."""
    if matrix.block is not None:
        return 0  # float32 scales do not underflow
    ones = matrix.scale == 1  # among them every scale that became zero, see `usable_scale`
    if not ones.any():
        return 0
    rows, groups = matrix.scale.shape
    finfo = torch.finfo(matrix.scale.dtype)
    largest = weight.view(rows, groups, -1)[ones].abs().amax(dim=1).to(torch.float32)
    too_small = (largest > 0) & (largest <= finfo.smallest_normal * finfo.eps * (1 << matrix.bits))
    steps = matrix.q.view(rows, groups, -1)[ones]
    if matrix.zero is not None:
        steps = steps - matrix.zero[ones][:, None]
    return int((too_small & ~steps.any(dim=1)).sum())
