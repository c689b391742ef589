"""Evaluation of the artifacts of one recipe: a record per artifact, each number measured in a process of its own.

Speed comes first, for all artifacts at once, because its ratios are taken within interleaved rounds. Then the baseline,
whose predictions the others are compared with, then everything else; each record is written as soon as it is complete,
so an evaluation that is interrupted goes on where it stopped. A record is kept when nothing it depends on has changed.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from quantlab.checkpoint.files import write_atomically
from quantlab.checkpoint.index import read_json
from quantlab.errors import ArtifactError, EvaluationError
from quantlab.evaluation import hardware
from quantlab.evaluation.jobs import (
    MemoryRequest,
    Progress,
    QualityRequest,
    SpeedRequest,
    SpeedResult,
    predictions_complete,
)
from quantlab.evaluation.processes import CellError, Worker
from quantlab.evaluation.record import Failure, Memory, Quality, Record, Speed, read_record
from quantlab.evaluation.suite import LoadedSuite, load_suite

RECORDS = "records"
_WORK = ".work"
_PREDICTIONS = ".baseline"
_WORDS = {"recipe", "recipe_sha256", "description", "artifact"}  # these change without changing a number


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
    """

    directory: Path
    recipe: str
    recipe_sha256: str
    suite: Path
    baseline: str
    cells: tuple[Cell, ...]
    reuse: bool = True
    time_limit: float = 3600.0


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
        ArtifactError: a record cannot be written.
    """
    evaluation = _prepare(request, progress or _silent)
    kept = {cell.variant: record for cell in request.cells if (record := _kept(evaluation, cell)) is not None}
    missing = [cell for cell in request.cells if cell.variant not in kept]
    if missing and not predictions_complete(evaluation.predictions, evaluation.key):
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
    return [kept[cell.variant] for cell in request.cells]


def _prepare(request: EvaluationRequest, progress: Progress) -> _Evaluation:
    baselines = [cell for cell in request.cells if cell.variant == request.baseline]
    if not baselines:
        raise EvaluationError(
            "the baseline is not among the artifacts",
            where="evaluate.baseline",
            found=request.baseline,
            fix="use one of: " + ", ".join(cell.variant for cell in request.cells),
        )
    suite = load_suite(request.suite)
    evaluation = _Evaluation(request, suite, baselines[0], hardware.describe(), hardware.versions(), progress)
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
    current = _record(evaluation, cell, quality=found.quality, memory=found.memory, speed=found.speed, failures=())
    if found.model_dump(exclude=_WORDS) != current.model_dump(exclude=_WORDS):
        return None
    if found != current:
        _write(evaluation, current)
    return current


def _record(
    evaluation: _Evaluation,
    cell: Cell,
    *,
    quality: Quality | None,
    memory: Memory | None,
    speed: Speed | None,
    failures: tuple[Failure, ...],
) -> Record:
    request = evaluation.request
    return Record(
        recipe=request.recipe,
        recipe_sha256=request.recipe_sha256,
        variant=cell.variant,
        description=cell.description,
        artifact=cell.artifact,
        artifact_sha256=cell.artifact_sha256,
        baseline=request.baseline,
        baseline_sha256=evaluation.baseline.artifact_sha256,
        suite=evaluation.suite.title,
        suite_sha256=evaluation.suite.sha256,
        hardware=evaluation.hardware,
        versions=evaluation.versions,
        quality=quality,
        memory=memory,
        speed=speed,
        failures=failures,
        tokens_per_expert=_tokens_per_expert(cell.directory),
    )


def _tokens_per_expert(artifact: Path) -> dict[str, tuple[int, ...]]:
    """What the manifest says of the calibration; nothing where there is none."""
    path = artifact / "manifest.json"
    found = read_json(path).get("tokens_per_expert", {}) if path.is_file() else {}
    return {block: tuple(counts) for block, counts in found.items()}


def _measure_speed(evaluation: _Evaluation, worker: Worker, cells: list[Cell]) -> None:
    if evaluation.suite.suite.speed is None:
        return

    def progress(stage: str, done: int, total: int) -> None:
        evaluation.progress(f"speed: {stage}", done, total)

    request = SpeedRequest(suite=evaluation.suite.path, artifacts={cell.variant: cell.directory for cell in cells})
    try:
        result = worker.run("speed", request, SpeedResult, progress=progress)
    except CellError as error:
        evaluation.speed_failures = {cell.variant: str(error) for cell in cells}
    else:
        evaluation.speeds, evaluation.speed_failures = result.speeds, result.failures


def _measure(evaluation: _Evaluation, worker: Worker, cell: Cell) -> Record:
    """Quality and memory of one artifact, joined with its speed."""
    failures = []
    quality, memory = None, None

    def progress(_: str, done: int, total: int) -> None:
        """One bar per row, whatever it is busy with."""
        evaluation.progress(f"{cell.variant}: quality", done, total)

    try:
        quality = worker.run(f"{cell.variant}-quality", _quality_request(evaluation, cell), Quality, progress=progress)
    except CellError as error:
        failures.append(Failure(cell="quality", reason=str(error)))
        if cell.variant == evaluation.request.baseline:
            evaluation.baseline_failure = str(error)
    else:
        if cell.variant != evaluation.request.baseline and evaluation.baseline_failure is not None:
            reason = f"nothing to compare with: the baseline failed: {evaluation.baseline_failure}"
            failures.append(Failure(cell="quality", reason=reason))
    try:
        request = MemoryRequest(directory=cell.directory, suite=evaluation.suite.path)
        memory = worker.run(f"{cell.variant}-memory", request, Memory, progress=_silent)
    except CellError as error:
        failures.append(Failure(cell="memory", reason=str(error)))
    if cell.variant in evaluation.speed_failures:
        failures.append(Failure(cell="speed", reason=evaluation.speed_failures[cell.variant]))
    speed = evaluation.speeds.get(cell.variant)
    return _record(evaluation, cell, quality=quality, memory=memory, speed=speed, failures=tuple(failures))


def _quality_request(evaluation: _Evaluation, cell: Cell) -> QualityRequest:
    role: Literal["baseline", "compared", "alone"] = "compared"
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
    )


def _write(evaluation: _Evaluation, record: Record) -> None:
    write_atomically(evaluation.path(record.variant), record.model_dump_json(indent=2).encode() + b"\n")


def _silent(stage: str, done: int, total: int) -> None:
    """Nobody asked."""
