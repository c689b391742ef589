"""The run: blocks in, shards out, one weight in memory at a time.

An artifact is made in a hidden work directory and appears under its name by one rename, when it is complete. Until then a
journal says which blocks are done; the same command continues after them.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from quantlab.checkpoint.reader import TORCH_DTYPES, Reader
from quantlab.checkpoint.writer import ShardWriter
from quantlab.errors import CheckpointError
from quantlab.formats.compressed_tensors import encode
from quantlab.formats.stored import StoredWeights
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.passes.apply import WeightReport, apply_passes
from quantlab.plan.model import Block, Plan, Shard, Step, VariantPlan
from quantlab.recipe.load import LoadedRecipe
from quantlab.recipe.schemes import SCHEMES
from quantlab.run.artifact import finish_artifact
from quantlab.run.directory import RunDirectory, make_directory
from quantlab.run.journal import FileRecord, FinishedBlock, Journal, journal_key

Progress = Callable[[int], None]
"""Told the bytes of the source that have just been dealt with."""


def run_variant(
    plan: Plan,
    variant: VariantPlan,
    recipe: LoadedRecipe,
    directory: RunDirectory,
    progress: Progress,
    *,
    overwrite: bool = False,
) -> None:
    """Make the artifact of one variant, or finish it where an earlier run stopped.

    Raises:
        CheckpointError: a weight cannot be read or is not finite.
        ArtifactError: a file cannot be written, or unfinished work of another recipe is in the way.
    """
    source = StoredWeights(Reader(plan.checkpoint))
    shards = directory.shards(variant.name)
    if overwrite and journal_key(directory.journal(variant.name)) != variant.key:
        directory.tidy(variant)
    make_directory(shards)
    journal = Journal(directory.journal(variant.name), shards, key=variant.key)
    for block in variant.blocks:
        if not journal.has(block.name):
            journal.commit(make_block(block, source, shards, progress))
        else:
            progress(sum(step.source_bytes for shard in block.shards for step in shard.steps))
    finish_artifact(plan, variant, recipe, shards, journal.finished([block.name for block in variant.blocks]))
    directory.publish(variant)


def make_block(block: Block, source: StoredWeights, directory: Path, progress: Progress) -> FinishedBlock:
    """Read, change and write the weights of one block."""
    files: list[FileRecord] = []
    reports: dict[str, WeightReport] = {}
    for shard in block.shards:
        files.append(_make_shard(shard, source, directory, reports, progress))
    return FinishedBlock(block.name, tuple(files), reports)


def _make_shard(
    shard: Shard, source: StoredWeights, directory: Path, reports: dict[str, WeightReport], progress: Progress
) -> FileRecord:
    with ShardWriter(directory / shard.file, shard.tensors) as writer:
        for step in shard.steps:
            weight = read_finite(step, source)
            changed, report = _change(step, weight)
            if report is not None:
                reports[step.claim.name] = report
            for name, tensor in _encode(step, changed).items():
                writer.write(name, tensor)
            progress(step.source_bytes)
    return FileRecord(shard.file, writer.sha256, writer.nbytes)


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


def _change(step: Step, weight: Tensor) -> tuple[Tensor | QuantizedMatrix, WeightReport | None]:
    dtype = TORCH_DTYPES[step.dtype]
    if step.passes:
        changed, report = apply_passes(weight, step.passes, dtype=dtype)
        _check_range(step, weight, changed)
        return changed, report
    converted = weight.to(dtype)
    _check_range(step, weight, converted)
    return converted, None


def _check_range(step: Step, weight: Tensor, changed: Tensor | QuantizedMatrix) -> None:
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
    rows, groups = matrix.scale.shape
    finfo = torch.finfo(matrix.scale.dtype)
    largest = weight.view(rows, groups, -1).abs().amax(dim=2).to(torch.float32)
    too_small = (largest > 0) & (largest <= finfo.smallest_normal * finfo.eps * (1 << matrix.bits))
    return int((too_small & ~matrix.q.view(rows, groups, -1).any(dim=2)).sum())


def _encode(step: Step, changed: Tensor | QuantizedMatrix) -> dict[str, Tensor]:
    if isinstance(changed, Tensor):
        return {step.claim.name: changed}
    assert step.quantize is not None, "integers come from a quantize pass"
    return encode(step.claim.name, changed, SCHEMES[step.quantize.quantize])
