"""The run: blocks in, shards out, one weight in memory at a time.

An artifact is made in a hidden work directory and appears under its name by one rename, when it is complete. Until then a
journal says which blocks are done; the same command continues after them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quantlab.calibration.corpus import sample_tokens
from quantlab.checkpoint.reader import TORCH_DTYPES, Reader
from quantlab.checkpoint.writer import ShardWriter
from quantlab.formats.codecs.table import encode
from quantlab.formats.stored import StoredWeights
from quantlab.passes.apply import Changed, Group, WeightReport, apply_passes
from quantlab.plan.model import Block, Plan, Step, VariantPlan
from quantlab.recipe.load import LoadedRecipe
from quantlab.run.artifact import Making, finish_artifact
from quantlab.run.directory import RunDirectory, make_directory
from quantlab.run.identity import identify
from quantlab.run.journal import FileRecord, FinishedBlock, Journal, journal_identity
from quantlab.run.weights import check_range, read_finite

Progress = Callable[[int], None]
"""Told the bytes of the source that have just been dealt with."""


@dataclass(frozen=True)
class Settings:
    """How a run goes about its work.

    Attributes:
        device: where layers compute while they are calibrated; it is part of the identity of calibrated artifacts.
        overwrite: replace artifacts and unfinished work of other recipes instead of refusing.
        shared_bytes: disk space for what calibrated variants share.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    overwrite: bool = False
    shared_bytes: int = 0


def run_variant(
    plan: Plan,
    variant: VariantPlan,
    recipe: LoadedRecipe,
    directory: RunDirectory,
    progress: Progress,
    settings: Settings,
) -> None:
    """Make the artifact of one variant, or finish it where an earlier run stopped.

    Raises:
        CheckpointError: a weight cannot be read or is not finite.
        ArtifactError: a file cannot be written, or unfinished work of another recipe is in the way.
    """
    source = StoredWeights(Reader(plan.checkpoint))
    shards = directory.shards(variant.name)
    identity = identify(variant, settings.device)
    begun = journal_identity(directory.journal(variant.name))
    if begun is not None and (
        identity.difference(begun) == "code" or (settings.overwrite and begun["key"] != identity.key)
    ):
        directory.tidy(variant)
    tokens = _calibration_tokens(plan, variant, recipe)  # text that cannot be used is told before anything is written
    make_directory(shards)
    journal = Journal(directory.journal(variant.name), shards, identity=identity)
    calibrated = None
    if tokens is not None:
        from quantlab.run.calibrated import CalibratedRun, Places  # imports transformers, which takes seconds

        places = Places(directory.work(variant.name), directory.shared, settings.shared_bytes, settings.device)
        calibrated = CalibratedRun(plan, variant, tokens, partial(read_finite, source=source), places)
    for block in variant.blocks:
        if journal.has(block.name):
            progress(sum(step.source_bytes for shard in block.shards for step in shard.steps))
        elif calibrated is not None and calibrated.has(block):
            done = calibrated.change(block)
            finished = make_block(block, source, shards, progress, changed=done.changed)
            journal.commit(replace(finished, tokens_per_expert=done.tokens_per_expert, kept_experts=done.kept))
            calibrated.committed()
        else:
            journal.commit(make_block(block, source, shards, progress))
    blocks = journal.finished([block.name for block in variant.blocks])
    finish_artifact(Making(plan, variant, recipe, identity), shards, blocks)
    directory.publish(variant)


def _calibration_tokens(plan: Plan, variant: VariantPlan, recipe: LoadedRecipe) -> Tensor | None:
    """The text that the variant's algorithms watch the model read [samples, length]; None if none of them does."""
    calibration = variant.calibration
    if calibration is None:
        return None
    assert recipe.corpus is not None, "a calibrated variant has a corpus"
    return sample_tokens(
        recipe.corpus,
        plan.checkpoint.directory,
        samples=calibration.samples,
        length=calibration.length,
        seed=calibration.seed,
    )


def make_block(
    block: Block,
    source: StoredWeights,
    directory: Path,
    progress: Progress,
    *,
    changed: Mapping[str, Changed] | None = None,
) -> FinishedBlock:
    """Read, change and write the weights of one block; where they were changed already, write those."""
    files: list[FileRecord] = []
    reports: dict[str, WeightReport] = {}
    for shard in block.shards:
        with ShardWriter(directory / shard.file, shard.tensors) as writer:
            for step in shard.steps:
                if not step.outputs:
                    continue
                result, report = _change(step, source) if changed is None else changed[step.claim.name]
                if report is not None:
                    reports[step.claim.name] = report
                for name, tensor in encode(step.layout, step.claim.name, result).items():
                    writer.write(name, tensor)
                progress(step.source_bytes)
        files.append(FileRecord(shard.file, writer.sha256, writer.nbytes))
    return FinishedBlock(block.name, tuple(files), reports)


def _change(step: Step, source: StoredWeights) -> Changed:
    weight, dtype = read_finite(step, source), TORCH_DTYPES[step.dtype]
    result: Changed = weight.to(dtype), None
    if step.passes:
        result = apply_passes([Group({step.claim.name: weight})], step.passes, dtype=dtype)[step.claim.name]
    check_range(step, weight, result[0])
    return result
