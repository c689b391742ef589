"""The run of one variant: blocks in, shards out. The stages of a weight:

    plan          Step: location in the source, passes, dtype                             plan/
    read          BlockWeights: read once, decoded, checked to be finite                  formats/stored.py, run/weights.py
    statistics    HalfInputs: statistics of the activations that enter it                 calibration/inputs.py
    change        layer edits: experts removed, scales folded, linears changed            run/edits.py -> passes/ -> algorithms/
    encode        the tensors that store it                                               formats/
    write         ShardWriter: in the order of the shard's header                         checkpoint/writer.py

Without calibration there are no statistics and no layer edits: each weight is read, changed and written before the next one.
With calibration, a decoder layer is edited as a whole (`calibrated.py`, `block.py`) while the text passes through it.

An artifact is made in a hidden work directory and renamed to its final path when it is complete. Until then a journal
lists the finished blocks, and the same command continues after them.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quantlab.calibration.corpus import sample_tokens
from quantlab.calibration.drawn import DrawnText, draw_text
from quantlab.checkpoint.reader import Reader
from quantlab.checkpoint.writer import ShardWriter
from quantlab.formats.codecs.table import encode
from quantlab.formats.stored import StoredWeights
from quantlab.passes.apply import WeightReport
from quantlab.plan.model import Block, Plan, VariantPlan
from quantlab.recipe.load import LoadedRecipe
from quantlab.run.artifact import Making, finish_artifact
from quantlab.run.coverage import Covered, Covering
from quantlab.run.directory import RunDirectory, make_directory
from quantlab.run.identity import identify
from quantlab.run.journal import FileRecord, FinishedBlock, Journal, journal_identity
from quantlab.run.source import reached
from quantlab.run.weights import BlockWeights, Read, read_finite

Progress = Callable[[int], None]
"""Called with the number of source bytes processed since the last call."""


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Attributes:
        device: device of calibration; part of the identity of calibrated artifacts.
        overwrite: replace artifacts and unfinished work of other recipes instead of raising an error.
        shared_bytes: disk space for the results that calibrated variants share.
        disk: bytes that shards of a hub may take at a time; None for all of them.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    overwrite: bool = False
    shared_bytes: int = 0
    disk: int | None = None


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
        ArtifactError: a file cannot be written, or the directory contains unfinished work of another recipe.
    """
    source = StoredWeights(Reader(plan.checkpoint))
    shards = directory.shards(variant.name)
    identity = identify(variant, settings.device)
    begun = journal_identity(directory.journal(variant.name))
    if begun is not None and (
        identity.difference(begun) == "code" or (settings.overwrite and begun["key"] != identity.key)
    ):
        directory.tidy(variant)
    tokens, drawn = _calibration_tokens(
        plan, variant, recipe, directory
    )  # report unusable text before anything is written
    if drawn is not None:
        drawn.keep()
    make_directory(shards)
    journal = Journal(directory.journal(variant.name), shards, identity=identity)
    read = partial(read_finite, source=source)
    text = drawn.written() if drawn is not None else {}
    if drawn is not None and variant.calibration is not None and variant.calibration.coverage is not None:
        drawn, covered = _cover(plan, variant, recipe, directory, settings.device, drawn, read)
        tokens, text = drawn.tokens, drawn.written() | {"covered": asdict(covered)}
    calibrated = None
    if tokens is not None:
        from quantlab.run.calibrated import CalibratedRun, Resources  # imports transformers, which takes seconds

        resources = Resources(directory.work(variant.name), directory.shared, settings.shared_bytes, settings.device)
        calibrated = CalibratedRun(plan, variant, tokens, read, resources)
    for block in variant.blocks:
        reached(plan.checkpoint, variant, block)
        if journal.has(block.name):
            progress(block.source_bytes)
        elif calibrated is not None and calibrated.has(block):
            weights = BlockWeights(block, read)
            layer = calibrated.edit(block, weights)
            finished = write_block(block, weights, shards, progress)
            journal.commit(replace(finished, tokens_per_expert=layer.tokens_per_expert, kept_experts=layer.kept))
            calibrated.committed()
        else:
            journal.commit(write_block(block, BlockWeights(block, read), shards, progress))
    blocks = journal.finished([block.name for block in variant.blocks])
    finish_artifact(Making(plan, variant, recipe, identity, text), shards, blocks)
    directory.publish(variant)


def _calibration_tokens(
    plan: Plan, variant: VariantPlan, recipe: LoadedRecipe, directory: RunDirectory
) -> tuple[Tensor | None, DrawnText | None]:
    """The calibration text of a variant as tokens [samples, length], and as drawn from datasets; None without calibration."""
    calibration = variant.calibration
    if calibration is None:
        return None, None
    if recipe.datasets is not None:
        drawn = draw_text(recipe.datasets, calibration, plan.checkpoint.directory, directory.path)
        return drawn.tokens, drawn
    assert recipe.corpus is not None, "a calibrated variant has a corpus or datasets"
    tokens = sample_tokens(
        recipe.corpus,
        plan.checkpoint.directory,
        samples=calibration.samples,
        length=calibration.length,
        seed=calibration.seed,
    )
    return tokens, None


def _cover(
    plan: Plan,
    variant: VariantPlan,
    recipe: LoadedRecipe,
    directory: RunDirectory,
    device: torch.device,
    first: DrawnText,
    read: Read,
) -> tuple[DrawnText, Covered]:
    """The samples of a calibration that asks for coverage, and how far it is reached."""
    calibration, datasets = variant.calibration, recipe.datasets
    assert calibration is not None
    assert datasets is not None
    steps = {step.tensor.name: step for step in variant.steps}

    def draw(samples: int) -> DrawnText:
        if samples == calibration.samples:
            return first
        found = draw_text(datasets, calibration, plan.checkpoint.directory, directory.path, at_most=samples)
        found.keep()
        return found

    covering = Covering(
        plan.checkpoint,
        calibration,
        device,
        lambda name: read(steps[name]),
        directory.work(variant.name),
        directory.path,
    )
    return covering.cover(first, draw)


def write_block(block: Block, weights: BlockWeights, directory: Path, progress: Progress) -> FinishedBlock:
    """Encode and write the weights of one block, shard by shard; weights that were not edited are read and changed
    here.

    Raises:
        CheckpointError: a weight cannot be read or is not finite, or the dtype it is stored in cannot hold the result.
        ArtifactError: a shard cannot be written.
    """
    files: list[FileRecord] = []
    reports: dict[str, WeightReport] = {}
    for shard in block.shards:
        with ShardWriter(directory / shard.file, shard.tensors) as writer:
            for step in shard.steps:
                if not step.outputs:
                    continue
                result, report = weights.pop(step.tensor.name)
                if report is not None:
                    reports[step.tensor.name] = report
                for name, tensor in encode(step.layout, step.tensor.name, result).items():
                    writer.write(name, tensor)
                progress(step.source_bytes)
        files.append(FileRecord(shard.file, writer.sha256, writer.nbytes))
    return FinishedBlock(block.name, tuple(files), reports)
