"""Evaluation of the artifacts of one recipe: a record per artifact, each number measured in a process of its own.

Speed comes first, for all artifacts at once, because its ratios are taken within interleaved rounds. Then the baseline,
whose predictions the others are compared with, then everything else; each record is written as soon as it is complete,
so an evaluation that is interrupted goes on where it stopped. A record is kept when nothing it depends on has changed.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quantlab.checkpoint.files import write_atomically
from quantlab.errors import ArtifactError, EvaluationError
from quantlab.evaluation import hardware
from quantlab.evaluation.contexts import measure_contexts
from quantlab.evaluation.jobs import (
    MemoryRequest,
    Progress,
    QualityRequest,
    QualityResult,
    Role,
    SpeedRequest,
    SpeedResult,
    TasksRequest,
    TasksResult,
    predictions_complete,
)
from quantlab.evaluation.manifest import check_unchanged, matrix_errors, read_manifest, tokens_per_expert
from quantlab.evaluation.processes import CellError, Worker
from quantlab.evaluation.record import Attention, Failure, Memory, Quality, Record, Speed, TaskResult, read_record
from quantlab.evaluation.rows import adjusted
from quantlab.evaluation.scores import kept_scores
from quantlab.evaluation.suite import LoadedSuite, load_suite

RECORDS = "records"
_WORK = ".work"
_PREDICTIONS = ".baseline"
_WORDS = {"recipe", "recipe_sha256", "description", "artifact", "command"}  # these change without changing a number


@dataclass(frozen=True)
class Cell:
    """One artifact to evaluate.

    Attributes:
        variant: its row.
        description: the passes in one line, for people.
        directory: the artifact, or the source checkpoint.
        artifact: the same directory as records name it, relative to the run's directory.
        artifact_sha256: hash of its manifest; of the checkpoint's headers for `source`.
    """

    variant: str
    description: str
    directory: Path
    artifact: str
    artifact_sha256: str


@dataclass(frozen=True)
class EvaluationRequest:
    """The artifacts of one recipe.

    Attributes:
        directory: the run's directory; records are written into its folder `records`.
        recipe: the recipe's name.
        recipe_sha256: hash of its file.
        suite: the suite's file.
        baseline: the variant that losses are relative to; one of the cells.
        cells: what to evaluate, in the order of the rows.
        reuse: whether records that still hold are kept.
        time_limit: seconds that one measurement may take.
        command: what was run, for the records.
        device: where models compute: "cpu", "cuda" or "cuda:1".
        gpu: name of that device, for the records; empty for the CPU.
    """

    directory: Path
    recipe: str
    recipe_sha256: str
    suite: Path
    baseline: str
    cells: tuple[Cell, ...]
    reuse: bool = True
    time_limit: float = 3600.0
    command: str = ""
    device: str = "cpu"
    gpu: str = ""


@dataclass
class _Evaluation:
    """What the steps of one evaluation share."""

    request: EvaluationRequest
    suite: LoadedSuite
    baseline: Cell
    hardware: str
    versions: dict[str, str]
    progress: Progress
    baseline_failure: str | None = None
    speeds: Mapping[str, Speed] = field(default_factory=dict)
    speed_failures: Mapping[str, str] = field(default_factory=dict)

    @property
    def records(self) -> Path:
        return self.request.directory / RECORDS

    @property
    def predictions(self) -> Path:
        return self.records / _PREDICTIONS

    @property
    def key(self) -> str:
        """Names the baseline's predictions by everything they depend on."""
        parts = (self.baseline.artifact_sha256, self.suite.sha256, self.hardware, str(sorted(self.versions.items())))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def baseline_is_kept(self) -> bool:
        """Whether all that other rows are compared with is there."""
        answered = kept_scores(self.predictions, self.key) is not None
        return predictions_complete(self.predictions, self.key) and (answered or not self.suite.suite.tasks)

    def path(self, variant: str) -> Path:
        return self.records / f"{variant}.json"


def evaluate(request: EvaluationRequest, *, progress: Progress | None = None) -> list[Record]:
    """Measure every artifact and write its record.

    Args:
        request: what to measure.
        progress: told of each stage; also told how many records were kept.

    Returns:
        The records, in the order of the cells.

    Raises:
        RecipeError: the suite is malformed.
        EvaluationError: the corpus cannot be read, the baseline is no cell, or no process can be started.
        ArtifactError: an artifact was changed since it was made, or a record cannot be written.
    """
    evaluation = _prepare(request, progress or _silent)
    kept = {cell.variant: record for cell in request.cells if (record := _kept(evaluation, cell)) is not None}
    missing = [cell for cell in request.cells if cell.variant not in kept]
    if missing and not evaluation.baseline_is_kept():
        kept.pop(request.baseline, None)
    missing = [cell for cell in request.cells if cell.variant not in kept]
    if kept:
        evaluation.progress(f"{len(kept)} of {len(request.cells)} records kept from before", 1, 1)
    for cell in missing:  # stopped half-way, no record of something else stays behind
        evaluation.path(cell.variant).unlink(missing_ok=True)
    if missing:
        with Worker(evaluation.records / _WORK, threads=hardware.threads(), time_limit=request.time_limit) as worker:
            _measure_speed(evaluation, worker, missing)
            for cell in sorted(missing, key=lambda cell: cell.variant != request.baseline):
                kept[cell.variant] = _measure(evaluation, worker, cell)
                _write(evaluation, kept[cell.variant])
    records = adjusted([kept[cell.variant] for cell in request.cells])
    for record in records:
        if record != kept[record.variant]:
            _write(evaluation, record)
    return records


def _prepare(request: EvaluationRequest, progress: Progress) -> _Evaluation:
    baselines = [cell for cell in request.cells if cell.variant == request.baseline]
    if not baselines:
        raise EvaluationError(
            "the baseline is not among the artifacts",
            where="evaluate.baseline",
            found=request.baseline,
            fix="use one of: " + ", ".join(cell.variant for cell in request.cells),
        )
    for cell in request.cells:
        check_unchanged(cell.directory)
    suite = load_suite(request.suite)
    bridged = any(not task.ours for task in suite.suite.tasks)
    versions = hardware.versions() | (hardware.version_of("lm-eval") if bridged else {})
    evaluation = _Evaluation(request, suite, baselines[0], hardware.describe(request.gpu), versions, progress)
    try:
        evaluation.records.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            "the records cannot be written",
            where=str(evaluation.records),
            found=error.strerror,
            fix="choose another --out",
        ) from error
    return evaluation


def _kept(evaluation: _Evaluation, cell: Cell) -> Record | None:
    """The record of an earlier evaluation, if it is complete and measuring again could only repeat it."""
    path = evaluation.path(cell.variant)
    if not evaluation.request.reuse or not path.is_file():
        return None
    try:
        found = read_record(path)
    except ArtifactError:  # of another version: measured again
        return None
    measured = Measurements(found.quality, found.tasks, found.memory, found.speed, attention=found.attention)
    current = _record(evaluation, cell, measured)
    current = current.model_copy(update={"command": found.command})  # of the run that measured
    if found.model_dump(exclude=_WORDS) != current.model_dump(exclude=_WORDS):
        return None
    if found != current:
        _write(evaluation, current)
    return current


@dataclass(frozen=True)
class Measurements:
    """What was found out about one artifact."""

    quality: Quality | None
    tasks: tuple[TaskResult, ...]
    memory: Memory | None
    speed: Speed | None
    failures: tuple[Failure, ...] = ()
    attention: Attention | None = None


def _record(evaluation: _Evaluation, cell: Cell, found: Measurements) -> Record:
    request, suite = evaluation.request, evaluation.suite
    manifest = read_manifest(cell.directory)
    return Record(
        recipe=request.recipe,
        recipe_sha256=request.recipe_sha256,
        variant=cell.variant,
        description=cell.description,
        artifact=cell.artifact,
        artifact_sha256=cell.artifact_sha256,
        baseline=request.baseline,
        baseline_sha256=evaluation.baseline.artifact_sha256,
        suite=suite.title,
        suite_sha256=suite.sha256,
        suite_name=suite.suite.name,
        suite_version=suite.suite.version,
        seeds=_seeds(suite),
        command=request.command,
        hardware=evaluation.hardware,
        versions=evaluation.versions,
        quality=found.quality,
        memory=found.memory,
        speed=found.speed,
        failures=found.failures,
        tokens_per_expert=tokens_per_expert(manifest),
        tasks=found.tasks,
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


def _measure_speed(evaluation: _Evaluation, worker: Worker, cells: list[Cell]) -> None:
    if evaluation.suite.suite.speed is None:
        return

    def progress(stage: str, done: int, total: int) -> None:
        evaluation.progress(f"speed: {stage}", done, total)

    artifacts = {cell.variant: cell.directory for cell in cells}
    request = SpeedRequest(suite=evaluation.suite.path, artifacts=artifacts, device=evaluation.request.device)
    try:
        result = worker.run("speed", request, SpeedResult, progress=progress)
    except CellError as error:
        evaluation.speed_failures = {cell.variant: str(error) for cell in cells}
    else:
        evaluation.speeds, evaluation.speed_failures = result.speeds, result.failures


def _measure(evaluation: _Evaluation, worker: Worker, cell: Cell) -> Record:
    """Quality, tasks and memory of one artifact, joined with its speed; of the baseline also attention."""
    failures: list[Failure] = []
    quality = _measure_quality(evaluation, worker, cell, failures)
    tasks = _measure_tasks(evaluation, worker, cell, failures)
    memory = None
    try:
        request = MemoryRequest(directory=cell.directory, suite=evaluation.suite.path, device=evaluation.request.device)
        memory = worker.run(f"{cell.variant}-memory", request, Memory, progress=_silent)
    except CellError as error:
        failures.append(Failure(cell="memory", reason=str(error)))
    if cell.variant in evaluation.speed_failures:
        failures.append(Failure(cell="speed", reason=evaluation.speed_failures[cell.variant]))
    speed = evaluation.speeds.get(cell.variant)
    attention = None
    if cell.variant == evaluation.request.baseline:
        attention = measure_contexts(
            worker,
            evaluation.suite,
            cell.directory,
            device=evaluation.request.device,
            progress=evaluation.progress,
        )
    return _record(evaluation, cell, Measurements(quality, tasks, memory, speed, tuple(failures), attention))


def _measure_quality(evaluation: _Evaluation, worker: Worker, cell: Cell, failures: list[Failure]) -> Quality | None:
    def progress(_: str, done: int, total: int) -> None:
        """One bar per row, whatever it is busy with."""
        evaluation.progress(f"{cell.variant}: quality", done, total)

    try:
        found = worker.run(
            f"{cell.variant}-quality", _quality_request(evaluation, cell), QualityResult, progress=progress
        )
    except CellError as error:
        failures.append(Failure(cell="quality", reason=str(error)))
        if cell.variant == evaluation.request.baseline:
            evaluation.baseline_failure = str(error)
        return None
    if cell.variant != evaluation.request.baseline and evaluation.baseline_failure is not None:
        reason = f"nothing to compare with: the baseline failed: {evaluation.baseline_failure}"
        failures.append(Failure(cell="quality", reason=reason))
    failures += [Failure(cell="quality", reason=f"{part}: {why}") for part, why in found.failures.items()]
    return found.quality


def _measure_tasks(
    evaluation: _Evaluation, worker: Worker, cell: Cell, failures: list[Failure]
) -> tuple[TaskResult, ...]:
    """The suite's tasks in its order."""
    if not evaluation.suite.suite.tasks:
        return ()
    request = TasksRequest(**_quality_request(evaluation, cell).model_dump(exclude={"kind"}))

    def progress(_: str, done: int, total: int) -> None:
        evaluation.progress(f"{cell.variant}: tasks", done, total)

    try:
        result = worker.run(f"{cell.variant}-tasks", request, TasksResult, progress=progress)
    except CellError as error:
        failures.append(Failure(cell="tasks", reason=str(error)))
        return ()
    failures += [Failure(cell="tasks", reason=f"{name}: {why}") for name, why in result.failures.items()]
    return result.tasks


def _quality_request(evaluation: _Evaluation, cell: Cell) -> QualityRequest:
    role: Role = "compared"
    if cell.variant == evaluation.request.baseline:
        role = "baseline"
    elif evaluation.baseline_failure is not None:
        role = "alone"
    return QualityRequest(
        directory=cell.directory,
        suite=evaluation.suite.path,
        predictions=evaluation.predictions,
        role=role,
        key=evaluation.key,
        device=evaluation.request.device,
    )


def _write(evaluation: _Evaluation, record: Record) -> None:
    write_atomically(evaluation.path(record.variant), record.model_dump_json(indent=2).encode() + b"\n")


def _silent(stage: str, done: int, total: int) -> None:
    """Nobody asked."""
