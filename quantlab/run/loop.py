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
from quantlab.run.journal import FileRecord, FinishedBlock, Journal

Progress = Callable[[int], None]
"""Told the bytes of the source that have just been dealt with."""


def run_variant(
    plan: Plan, variant: VariantPlan, recipe: LoadedRecipe, directory: RunDirectory, progress: Progress
) -> None:
    """Make the artifact of one variant, or finish it where an earlier run stopped.

    Raises:
        CheckpointError: a weight cannot be read or is not finite.
        ArtifactError: a file cannot be written, or the directory belongs to another recipe.
    """
    source = StoredWeights(Reader(plan.checkpoint))
    work = directory.work(variant.name)
    make_directory(work)
    journal = Journal(directory.journal(variant.name), work, key=variant.key)
    for block in variant.blocks:
        if not journal.has(block.name):
            journal.commit(make_block(block, source, work, progress))
        else:
            progress(sum(step.source_bytes for shard in block.shards for step in shard.steps))
    finish_artifact(plan, variant, recipe, work, journal.finished([block.name for block in variant.blocks]))
    directory.artifact(variant.name).parent.mkdir(exist_ok=True)
    work.replace(directory.artifact(variant.name))
    journal.path.unlink()


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
        return apply_passes(weight, step.passes, dtype=dtype)
    converted = weight.to(dtype)
    if not is_finite(converted):
        raise CheckpointError(
            "a weight overflows the dtype it is cast to",
            where=f"{step.source.file}, {step.claim.name}",
            found=f"largest magnitude {weight.abs().max().item():.4g}, {step.dtype} ends at {torch.finfo(dtype).max:.4g}",
            fix="cast to bfloat16 instead",
        )
    return converted, None


def _encode(step: Step, changed: Tensor | QuantizedMatrix) -> dict[str, Tensor]:
    if isinstance(changed, Tensor):
        return {step.claim.name: changed}
    assert step.quantize is not None, "integers come from a quantize pass"
    return encode(step.claim.name, changed, SCHEMES[step.quantize.quantize])
