"""The weights of a block on their way from the source to the artifact.

    read      once, when somebody first asks, and checked to be finite
    edited    experts removed, scales folded in: the weight as a function of the source, nothing rounded
    result    what the passes made of it: in the dtype it is stored in, or on its integer grid
    taken     handed out to be encoded and written

A weight is held as it was read until its result takes its place, and a result until it is taken. A block therefore holds at
most one copy of its weights, in the dtype of the source or of the result. Where no layer edit asks, that is one weight.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quantlab.architectures.architecture import Claim
from quantlab.checkpoint.reader import TORCH_DTYPES
from quantlab.errors import CheckpointError
from quantlab.formats.stored import StoredWeights
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.passes.apply import Changed, Group, WeightReport, apply_passes
from quantlab.plan.model import Block, Step

Read = Callable[[Step], Tensor]
"""Reads the source weight of a step."""
Change = Callable[[Tensor], Tensor]
"""Computes an edited weight from the weight before."""
Restructure = Callable[[Mapping[str, Tensor], Mapping[str, Claim]], dict[str, Tensor]]
"""Computes the tensors of a smaller layer from those of a layer and what they are, by name."""


class BlockWeights:
    """The weights of one block.

    Args:
        block: of the plan.
        read: reads a source weight.

    Attributes:
        steps: what the plan says of each weight, by name.
    """

    def __init__(self, block: Block, read: Read) -> None:
        self.steps: Mapping[str, Step] = {step.claim.name: step for shard in block.shards for step in shard.steps}
        self._read = read
        self._sources: dict[str, Tensor] = {}
        self._folds: dict[str, list[Change]] = {}
        self._results: dict[str, Changed] = {}

    def source(self, name: str) -> Tensor:
        """A weight with the edits so far and no pass applied, in the dtype of the source or, with a fold, in float32."""
        assert name not in self._results, f"{name} has been changed"
        if name not in self._sources:
            self._sources[name] = self._read(self.steps[name])
        weight = self._sources[name]
        for change in self._folds.get(name, ()):
            weight = change(weight)
        return weight

    def stored(self, name: str) -> Tensor:
        """A weight that no pass changes, as it will be stored."""
        return self.source(name).to(TORCH_DTYPES[self.steps[name].dtype])

    def fold(self, name: str, change: Change) -> None:
        """Let a fold change a weight from now on."""
        self._folds.setdefault(name, []).append(change)

    def restructure(self, change: Restructure) -> None:
        """Replace the weights that have been read and not changed by those of a smaller layer."""
        claims = {name: self.steps[name].claim for name in self._sources}
        self._sources = change(self._sources, claims)

    def set(self, name: str, weight: Tensor, result: Tensor | QuantizedMatrix, report: WeightReport | None) -> None:
        """Put the result of the passes in the place of a weight.

        Args:
            name: of the weight.
            weight: as `source` gave it, on the device of the result.
            result: of the passes.
            report: on it; None where no pass changed it.

        Raises:
            CheckpointError: the dtype it is stored in cannot hold the result.
        """
        check_range(self.steps[name], weight, result)
        self._results[name] = result.to("cpu"), report
        del self._sources[name]

    def changed(self, name: str) -> bool:
        """Whether a weight has its result."""
        return name in self._results

    def take(self, name: str) -> Changed:
        """Hand out the result of a weight and forget it. A weight without one is changed now, without statistics.

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
    """Whether a tensor has neither NaN nor infinity; in one pass without temporaries, since both show in the extremes."""
    if weight.numel() == 0 or not weight.is_floating_point():
        return True
    low, high = weight.aminmax()
    return bool(low.isfinite() and high.isfinite())


def check_range(step: Step, weight: Tensor, changed: Tensor | QuantizedMatrix) -> None:
    """Refuse a result that its dtype cannot hold.

    Raises:
        CheckpointError: values or scales became infinite, or scales zero where weights are not.
    """
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
    """Number of groups that became zero because their scale is too small to store; pruned groups do not count."""
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
