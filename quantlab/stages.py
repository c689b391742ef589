"""The stages of a recipe, as the command line calls them: make the artifacts, measure them, write the matrix."""

import hashlib
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from quantlab import console as show
from quantlab.checkpoint.hub import HubShards
from quantlab.checkpoint.index import Checkpoint
from quantlab.evaluation.evaluate import RECORDS, evaluate
from quantlab.evaluation.manifest import weights_sha256
from quantlab.evaluation.record import Foreign, Pass, Record
from quantlab.evaluation.request import EvaluatedArtifact, EvaluationRequest
from quantlab.evaluation.suite import load_suite
from quantlab.exports.export import export, open_artifact
from quantlab.plan.model import Plan, VariantPlan
from quantlab.preflight import Checked, check_before_running
from quantlab.recipe.algorithms import Reap
from quantlab.recipe.load import LoadedRecipe
from quantlab.recipe.schema import Cast, Prune, Quantize
from quantlab.recipe.schemes import FormatName
from quantlab.report.files import write_report
from quantlab.report.matrix.matrix import Matrix
from quantlab.run.artifact import MANIFEST_NAME
from quantlab.run.directory import RunDirectory
from quantlab.run.execute import MadeArtifacts, make_artifacts
from quantlab.run.exports import Export, write_exports
from quantlab.run.loop import Settings
from quantlab.runtime.device import name_of
from quantlab.texts.locate import Commits

SOURCE_HASHES = ".source.json"
"""File with the hashes of the source's shards, in the run's directory; records are valid while the hashes match."""


def check(
    recipe: LoadedRecipe, plan: Plan, out: Path, commits: Commits, *, time_limit: float, console: Console, quiet: bool
) -> Checked:
    """Try everything that the recipe will need, with a progress bar where it takes longer.

    Raises:
        ArtifactError, CheckpointError, CalibrationError, EvaluationError: see `check_before_running`.
    """
    with show.progress_bars(console, quiet=quiet) as bars:
        return check_before_running(recipe, plan, out, commits, progress=show.StageBars(bars), time_limit=time_limit)


def make(
    recipe: LoadedRecipe, plan: Plan, out: Path, settings: Settings, *, console: Console, quiet: bool
) -> MadeArtifacts:
    """Make the missing artifacts, each with a progress bar.

    Raises:
        CheckpointError, ArtifactError, PlanError: see `make_artifacts`.
    """
    directory = RunDirectory(out)
    with show.progress_bars(console, quiet=quiet) as bars:

        def announce(variant: VariantPlan) -> Callable[[int], None]:
            task = bars.add_task(variant.name, total=plan.source_bytes, detail=variant.description)
            return lambda nbytes: bars.advance(task, nbytes)

        return make_artifacts(plan, recipe, directory, announce, settings)


def export_artifacts(plan: Plan, out: Path, *, console: Console, quiet: bool) -> list[Export]:
    """Write the missing exports of finished artifacts, each with a progress bar.

    Raises:
        ArtifactError, CheckpointError: see `write_exports`.
    """
    with show.progress_bars(console, quiet=quiet) as bars:

        def announce(variant: VariantPlan, format: FormatName) -> Callable[[int], None]:
            elements = sum(step.source.elements for step in variant.steps if step.outputs)
            task = bars.add_task(f"{variant.name}.{format}", total=elements, detail="export")
            return lambda count: bars.advance(task, count)

        return write_exports(plan, RunDirectory(out), announce)


def export_artifact(
    artifact: Path, format: FormatName, out: Path, *, overwrite: bool, console: Console, quiet: bool
) -> tuple[str, ...]:
    """Write one finished artifact in a format, with a progress bar; returns the notes of the writer.

    Raises:
        ArtifactError, CheckpointError: see `export`.
    """
    elements = open_artifact(artifact).contents.elements
    with show.progress_bars(console, quiet=quiet) as bars:
        task = bars.add_task(out.name, total=elements, detail="export")
        return export(artifact, format, out, lambda count: bars.advance(task, count), overwrite=overwrite)


@dataclass(frozen=True)
class Measuring:
    """Settings of the measurements.

    Attributes:
        device: the device of the models.
        time_limit: seconds that one measurement, or one task, may take.
        reuse: keep earlier records whose artifact, suite, baseline and hardware are unchanged.
        quiet: no progress bars.
        held_out: held-out text that was drawn from the suite's datasets; None if it names a corpus.
    """

    device: torch.device
    time_limit: float
    reuse: bool = True
    quiet: bool = False
    held_out: Path | None = None


def measure(recipe: LoadedRecipe, plan: Plan, out: Path, how: Measuring, *, console: Console) -> Matrix:
    """Measure every artifact and write the records and the matrix.

    Args:
        recipe: a recipe with an `evaluate` section.
        plan: the compiled recipe.
        out: the run's directory, with all artifacts.
        how: settings of the measurements.
        console: where progress bars are shown.

    Raises:
        ArtifactError: an artifact is missing, or was made from another recipe, or another run uses the directory.
        EvaluationError: the suite's text cannot be read.
        CheckpointError: a shard of the source cannot be fetched from the hub.
    """
    directory = RunDirectory(out)
    if isinstance(plan.checkpoint.shards, HubShards):
        plan.checkpoint.shards.fetch_all()  # the source is measured, too
    with directory.locked():
        return _measure(recipe, plan, directory, how, console=console)


def _measure(recipe: LoadedRecipe, plan: Plan, directory: RunDirectory, how: Measuring, *, console: Console) -> Matrix:
    outdated = [variant.name for variant in plan.variants if not directory.check_measurable(variant)]
    if outdated and not how.quiet:
        text = f"made with other versions of the code or libraries, measured without rebuilding: {', '.join(outdated)} (`quantlab run` rebuilds them)"
        console.print(text, highlight=False, markup=False)
    request = _request(recipe, plan, directory, how)
    if how.device.type == "cuda":
        torch.cuda.empty_cache()  # free cached memory for the measuring processes
    with show.progress_bars(console, quiet=how.quiet) as bars:
        records = evaluate(request, progress=show.StageBars(bars))
    records = _judged(recipe, plan, directory, records, how, console=console)
    return write_report(records, directory.path, claims=recipe.claims)


def _judged(
    recipe: LoadedRecipe,
    plan: Plan,
    directory: RunDirectory,
    records: list[Record],
    how: Measuring,
    *,
    console: Console,
) -> list[Record]:
    """The records with the verdicts of the recipe's engines, after everything that is timed."""
    wanted = recipe.recipe.evaluate
    if wanted is None or not wanted.verify:
        return records
    from quantlab.evaluation.engines.judge import Judging  # imports transformers
    from quantlab.evaluation.engines.record_verdicts import judge_run, write_record

    artifacts = [directory.artifact(variant.name) for variant in plan.variants]
    assert recipe.suite is not None, "a recipe that evaluates has a suite"
    suite = load_suite(recipe.suite, held_out=how.held_out)
    with console.status("other engines") if not how.quiet else nullcontext() as status:
        tell = (lambda text: status.update(text)) if status is not None else (lambda _: None)
        judging = Judging(source=plan.checkpoint.directory, corpus=suite.corpus, reuse=how.reuse, tell=tell)
        found = judge_run(artifacts, wanted.verify, judging)
    by_variant = {artifact.name: verdicts for artifact, verdicts in found.items()}
    judged = [
        record.model_copy(update={"engines": by_variant.get(record.variant, record.engines)}) for record in records
    ]
    for record in judged:
        write_record(directory.path / RECORDS / f"{record.variant}.json", record)
    return judged


def _request(recipe: LoadedRecipe, plan: Plan, directory: RunDirectory, how: Measuring) -> EvaluationRequest:
    from quantlab.evaluation.machine.capacity import (
        cells_at_once,
    )  # imports transformers, which making artifacts may do without

    wanted = recipe.recipe.evaluate
    assert wanted is not None, "asked only of recipes that evaluate"
    assert recipe.suite is not None, "asked only of recipes that evaluate"
    source = plan.checkpoint
    artifacts = []
    for variant in plan.variants:
        artifact = directory.artifact(variant.name)
        digest = hashlib.sha256((artifact / MANIFEST_NAME).read_bytes()).hexdigest()
        passes = tuple(_as_recorded(step) for step in recipe.recipe.variants[variant.name].passes)
        artifacts.append(
            EvaluatedArtifact(variant.name, variant.description, artifact, f"artifacts/{variant.name}", digest, passes)
        )
    for peer in plan.peers:
        digest = _hash_of(peer.checkpoint, directory.path / f".peer-{peer.name}.json")
        foreign = Foreign(method=peer.method, producer=peer.producer)
        path = recipe.recipe.peers[peer.name]
        artifacts.append(
            EvaluatedArtifact(
                peer.name, peer.description, peer.checkpoint.directory, path, digest, passes=(), foreign=foreign
            )
        )
    digest = _hash_of(source, directory.path / SOURCE_HASHES)
    as_it_is = EvaluatedArtifact("source", "the checkpoint as it is", source.directory, recipe.recipe.model, digest)
    return EvaluationRequest(
        directory=directory.path,
        recipe=recipe.name,
        recipe_sha256=recipe.sha256,
        suite=recipe.suite,
        baseline=wanted.baseline,
        artifacts=(as_it_is, *artifacts),
        reuse=how.reuse,
        time_limit=how.time_limit,
        command=shlex.join(["quantlab", *sys.argv[1:]]),
        device=str(how.device),
        gpu=name_of(how.device),
        held_out=how.held_out,
        side_by_side=cells_at_once([artifact.directory for artifact in (as_it_is, *artifacts)], how.device),
    )


def _hash_of(checkpoint: Checkpoint, known: Path) -> str:
    """Hash of a checkpoint's config, headers and weights; `known` caches the hashes of its shards."""
    weights = weights_sha256(checkpoint.files, known)
    return hashlib.sha256(f"{checkpoint.fingerprint()} {weights}".encode()).hexdigest()


def _as_recorded(step: Cast | Quantize | Prune) -> Pass:
    """A pass of the recipe in the form stored in records."""
    if isinstance(step, Cast):
        return Pass(operation="cast", setting=step.cast)
    if isinstance(step, Quantize):
        return Pass(operation="quantize", setting=step.quantize, algorithm=step.algorithm.name)
    operation: Literal["prune", "remove experts"] = "remove experts" if isinstance(step.algorithm, Reap) else "prune"
    return Pass(operation=operation, setting=f"{step.prune}", algorithm=step.algorithm.name)
