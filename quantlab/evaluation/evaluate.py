"""Evaluation of the artifacts of one recipe: a record per artifact, each number measured in a process of its own.

The baseline comes first, whose predictions the others are compared with, then one row after the other. Speed is timed for all
artifacts at once, because its ratios are taken within interleaved rounds, by processes at the beginning, at the end and
between. Each record is written as soon as the rest of it is known, so an evaluation that is interrupted goes on where it
stopped; its speed is timed anew. A record is kept when nothing it depends on has changed; of one with failures what failed is
tried again, and all else is kept.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from quantlab import hardware
from quantlab.errors import ArtifactError, EvaluationError
from quantlab.evaluation.holm_correction import with_holm_correction
from quantlab.evaluation.manifest import check_unchanged, made_by, matrix_errors, read_manifest, tokens_per_expert
from quantlab.evaluation.processes.artifact_cells import (
    ArtifactResults,
    EvaluationContext,
    SpeedProcesses,
    measure_artifact,
    reusable_results,
)
from quantlab.evaluation.processes.messages import Progress, predictions_complete
from quantlab.evaluation.processes.worker_client import Worker
from quantlab.evaluation.record import Failure, Pass, Record, read_record
from quantlab.evaluation.suite import LoadedSuite, load_suite
from quantlab.evaluation.tasks.scores import same_task, saved_scores
from quantlab.files import write_atomically
from quantlab.fingerprint import code_fingerprint

RECORDS = "records"
_WORK = ".work"
_BASELINE = ".baseline"
_WORDS = {
    "recipe",
    "recipe_sha256",
    "description",
    "passes",
    "artifact",
    "command",
}  # these change without changing a number
_CELLS = {
    "quality": ("quantlab.evaluation.quality.measure",),
    "served": ("quantlab.evaluation.served.measure",),
    "tasks": ("quantlab.evaluation.tasks.measure",),
    "memory": ("quantlab.evaluation.memory.measure",),
    "speed": ("quantlab.evaluation.speed.measure", "quantlab.evaluation.speed.rates"),
    "attention": ("quantlab.evaluation.memory.attention",),
}
"""The modules that measure each cell; a cell is measured again when code that they reach has changed."""


@dataclass(frozen=True)
class EvaluatedArtifact:
    """One artifact to evaluate.

    Attributes:
        variant: its row.
        description: the passes in one line, for people.
        directory: the artifact, or the source checkpoint.
        artifact: the same directory as records name it, relative to the run's directory.
        artifact_sha256: hash of its manifest; of the checkpoint's configuration and weights for `source`.
        passes: the passes as data; none for a checkpoint as it is.
    """

    variant: str
    description: str
    directory: Path
    artifact: str
    artifact_sha256: str
    passes: tuple[Pass, ...] = ()


@dataclass(frozen=True)
class EvaluationRequest:
    """The artifacts of one recipe.

    Attributes:
        directory: the run's directory; records are written into its folder `records`.
        recipe: the recipe's name.
        recipe_sha256: hash of its file.
        suite: the suite's file.
        baseline: the variant that losses are relative to; one of the artifacts.
        artifacts: what to evaluate, in the order of the rows, the source checkpoint first.
        reuse: whether records that still hold are kept.
        time_limit: seconds that one measurement may take, and one task.
        command: what was run, for the records.
        device: where models compute: "cpu", "cuda" or "cuda:1".
        gpu: name of that device, for the records; empty for the CPU.
    """

    directory: Path
    recipe: str
    recipe_sha256: str
    suite: Path
    baseline: str
    artifacts: tuple[EvaluatedArtifact, ...]
    reuse: bool = True
    time_limit: float = 3600.0
    command: str = ""
    device: str = "cpu"
    gpu: str = ""


@dataclass(frozen=True)
class _Evaluation:
    """What the steps of one evaluation share."""

    request: EvaluationRequest
    suite: LoadedSuite
    baseline: EvaluatedArtifact
    hardware: str
    versions: dict[str, str]
    progress: Progress

    @property
    def records(self) -> Path:
        return self.request.directory / RECORDS

    @property
    def predictions(self) -> Path:
        return self.records / _BASELINE / "text"

    @property
    def scores(self) -> Path:
        return self.records / _BASELINE / "tasks.json"

    @property
    def key(self) -> str:
        """Names the baseline's answers by everything they depend on."""
        facts = {**self.versions, **hardware.environment(), **{name: self.code[name] for name in ("quality", "tasks")}}
        parts = (self.baseline.artifact_sha256, self.suite.sha256, self.hardware, str(sorted(facts.items())))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def code(self) -> dict[str, str]:
        """The fingerprint of the code that measures each cell on this device."""
        others = () if self.request.gpu else ("quantlab.runtime.cuda",)
        return {cell: code_fingerprint(roots, without=others) for cell, roots in _CELLS.items()}

    def is_baseline(self, artifact: EvaluatedArtifact) -> bool:
        return artifact.variant == self.baseline.variant

    def path(self, variant: str) -> Path:
        return self.records / f"{variant}.json"

    def context(self, worker: Worker) -> EvaluationContext:
        return EvaluationContext(
            worker, self.suite, self.predictions, self.scores, self.key, self.request.device, self.progress
        )


def evaluate(request: EvaluationRequest, *, progress: Progress | None = None) -> list[Record]:
    """Measure every artifact and write its record.

    Args:
        request: what to measure.
        progress: told of each stage; also told how many records were kept.

    Returns:
        The records, in the order of the artifacts.

    Raises:
        RecipeError: the suite is malformed.
        EvaluationError: the corpus cannot be read, the baseline is no artifact, or no process can be started.
        ArtifactError: an artifact was changed since it was made, or a record cannot be written.
    """
    evaluation = _prepare(request, progress or _silent)
    found = _known(evaluation)
    missing = [
        artifact
        for artifact in request.artifacts
        if found[artifact.variant].is_incomplete(evaluation.suite, is_baseline=evaluation.is_baseline(artifact))
    ]
    if len(missing) < len(request.artifacts):
        kept = len(request.artifacts) - len(missing)
        evaluation.progress(f"{kept} of {len(request.artifacts)} records kept from before", 1, 1)
    for artifact in missing:  # stopped half-way, no record of something else stays behind
        if found[artifact.variant] == ArtifactResults():
            evaluation.path(artifact.variant).unlink(missing_ok=True)
    if missing:
        _measure(evaluation, missing, found)
    records = with_holm_correction(
        [_record(evaluation, artifact, found[artifact.variant]) for artifact in request.artifacts]
    )
    for record in records:
        _write(evaluation, record)
    return records


def _prepare(request: EvaluationRequest, progress: Progress) -> _Evaluation:
    baselines = [artifact for artifact in request.artifacts if artifact.variant == request.baseline]
    if not baselines:
        raise EvaluationError(
            "the baseline is not among the artifacts",
            where="evaluate.baseline",
            found=request.baseline,
            fix="use one of: " + ", ".join(artifact.variant for artifact in request.artifacts),
        )
    for artifact in request.artifacts:
        check_unchanged(artifact.directory)
    suite = load_suite(request.suite)
    bridged = any(not task.ours for task in suite.suite.tasks)
    versions = hardware.versions() | (hardware.version_of("lm-eval") if bridged else {})
    evaluation = _Evaluation(request, suite, baselines[0], hardware.describe(request.gpu), versions, progress)
    try:
        evaluation.records.mkdir(parents=True, exist_ok=True)
        if not request.reuse:
            evaluation.scores.unlink(missing_ok=True)
    except OSError as error:
        raise ArtifactError(
            "the records cannot be written",
            where=str(evaluation.records),
            found=error.strerror,
            fix="choose another --out",
        ) from error
    return evaluation


def _known(evaluation: _Evaluation) -> dict[str, ArtifactResults]:
    """What earlier evaluations found of every variant and still holds."""
    found = {artifact.variant: _earlier(evaluation, artifact) for artifact in evaluation.request.artifacts}
    baseline = evaluation.baseline.variant
    others = [one for variant, one in found.items() if variant != baseline]
    if any(one.quality is None or one.served is None for one in others) and not predictions_complete(
        evaluation.predictions, evaluation.key
    ):
        found[baseline] = replace(found[baseline], quality=None)  # there would be nothing to compare with
    answered = saved_scores(evaluation.scores, evaluation.key)
    tasks = {
        number: result
        for number, result in found[baseline].tasks.items()
        if all(number in one.tasks for one in others) or same_task(result, answered) is not None
    }
    found[baseline] = replace(found[baseline], tasks=tasks)
    return found


def _earlier(evaluation: _Evaluation, artifact: EvaluatedArtifact) -> ArtifactResults:
    """What the record of an earlier evaluation says, where measuring again could only repeat it."""
    path = evaluation.path(artifact.variant)
    if not evaluation.request.reuse or not path.is_file():
        return ArtifactResults()
    try:
        record = read_record(path)
    except ArtifactError:  # of another version: measured again
        return ArtifactResults()
    tasks = dict(enumerate(record.tasks))
    same = _record(
        evaluation,
        artifact,
        ArtifactResults(
            record.quality,
            record.served,
            tasks,
            record.memory,
            record.speed,
            record.attention,
            failures=record.failures,
        ),
    )
    apart = _WORDS | {"code"}
    if record.model_dump(exclude=apart) != same.model_dump(exclude=apart):
        return ArtifactResults()
    changed = {cell for cell, fingerprint in evaluation.code.items() if record.code.get(cell) != fingerprint}
    return reusable_results(evaluation.suite, record).without(changed)


def _measure(evaluation: _Evaluation, missing: list[EvaluatedArtifact], found: dict[str, ArtifactResults]) -> None:
    """Measure what is missing. Each record is written as soon as it is complete but for its speed, and again with it."""
    request = evaluation.request
    with Worker(evaluation.records / _WORK, threads=hardware.threads(), time_limit=request.time_limit) as worker:
        context = evaluation.context(worker)
        turns = SpeedProcesses(
            context,
            {artifact.variant: artifact.directory for artifact in missing if found[artifact.variant].speed is None},
            source=request.artifacts[0].directory,
        )
        for done, artifact in enumerate(sorted(missing, key=lambda artifact: not evaluation.is_baseline(artifact))):
            turns.run_due(done / len(missing))
            variant = artifact.variant
            known = replace(found[variant], command=request.command, failures=())
            found[variant] = measure_artifact(
                context, variant, artifact.directory, known, is_baseline=evaluation.is_baseline(artifact)
            )
            _write(evaluation, _record(evaluation, artifact, found[variant]))
        turns.run_due(1.0)
    for artifact in missing:
        variant = artifact.variant
        known = found[variant]
        failures = _of_speed(turns.failures, variant) + known.failures
        found[variant] = replace(known, speed=turns.speeds.get(variant, known.speed), failures=failures)


def _of_speed(failures: Mapping[str, str], variant: str) -> tuple[Failure, ...]:
    return (Failure(cell="speed", reason=failures[variant]),) if variant in failures else ()


def _record(evaluation: _Evaluation, artifact: EvaluatedArtifact, found: ArtifactResults) -> Record:
    request, suite = evaluation.request, evaluation.suite
    manifest = read_manifest(artifact.directory)
    return Record(
        recipe=request.recipe,
        recipe_sha256=request.recipe_sha256,
        variant=artifact.variant,
        description=artifact.description,
        passes=artifact.passes,
        artifact=artifact.artifact,
        artifact_sha256=artifact.artifact_sha256,
        baseline=request.baseline,
        baseline_sha256=evaluation.baseline.artifact_sha256,
        suite=suite.title,
        suite_sha256=suite.sha256,
        suite_name=suite.suite.name,
        suite_version=suite.suite.version,
        seeds=_seeds(suite),
        command=found.command,
        hardware=evaluation.hardware,
        versions=evaluation.versions,
        made=made_by(manifest),
        code=evaluation.code,
        environment=hardware.environment(),
        quality=found.quality,
        served=found.served,
        memory=found.memory,
        speed=found.speed,
        failures=found.failures,
        tokens_per_expert=tokens_per_expert(manifest),
        tasks=tuple(found.tasks[number] for number in sorted(found.tasks)),
        attention=found.attention,
        matrix_errors=matrix_errors(manifest),
    )


def _seeds(suite: LoadedSuite) -> dict[str, int]:
    seeds = {"bootstrap": 0}
    if suite.suite.speed is not None:
        seeds |= {"speed twin": 0, "order of rounds": 0}
    if suite.suite.attention is not None:
        seeds["attention twin"] = 0
    for wanted in suite.suite.tasks:
        for number, seed in enumerate(wanted.seeds, start=1):
            seeds[f"task {Path(wanted.task).stem}" + (f", {number}" if len(wanted.seeds) > 1 else "")] = seed
    return seeds


def _write(evaluation: _Evaluation, record: Record) -> None:
    path, content = evaluation.path(record.variant), record.model_dump_json(indent=2).encode() + b"\n"
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)


def _silent(stage: str, done: int, total: int) -> None:
    """Nobody asked."""
