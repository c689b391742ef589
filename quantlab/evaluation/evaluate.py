"""Evaluation of the artifacts of one recipe: a record per artifact, each cell measured in its own process.

The baseline is measured first, because the others are compared with its predictions; then the other artifacts follow, one by
one on a CPU, several side by side on a GPU with room for them. Speed is timed for all artifacts together, because its ratios are
taken within interleaved rounds, and nothing else runs meanwhile. The timing processes are spread over the evaluation, the last
runs at its end. Each record is written as soon as everything but
its speed is measured, so an interrupted evaluation resumes there and times the speed again. A record is reused when nothing it
depends on has changed. In a record with failures, only the failed cells are measured again.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from quantlab import hardware
from quantlab.errors import ArtifactError, EvaluationError
from quantlab.evaluation.engines.verdict import read_verdicts
from quantlab.evaluation.holm_correction import with_holm_correction
from quantlab.evaluation.manifest import check_unchanged, made_by, matrix_errors, read_manifest, tokens_per_expert
from quantlab.evaluation.processes.artifact_cells import (
    ArtifactResults,
    EvaluationContext,
    SpeedProcesses,
    measure_artifact,
    measure_memory_of,
    reusable_results,
)
from quantlab.evaluation.processes.attention_cells import measure_contexts
from quantlab.evaluation.processes.messages import Progress, predictions_complete
from quantlab.evaluation.processes.workers import Workers
from quantlab.evaluation.record import Failure, Record, read_record
from quantlab.evaluation.request import EvaluatedArtifact, EvaluationRequest
from quantlab.evaluation.suite import LoadedSuite, load_suite
from quantlab.evaluation.tasks.scores import same_task, saved_scores
from quantlab.files import write_atomically
from quantlab.fingerprint import code_fingerprint

RECORDS = "records"
_WORK = ".work"
_BASELINE = ".baseline"
_DESCRIPTIVE_FIELDS = {
    "recipe",
    "recipe_sha256",
    "description",
    "passes",
    "artifact",
    "command",
    "engines",
}  # fields that may change without changing a number
_CELLS = {
    "quality": ("quantlab.evaluation.quality.measure",),
    "served": ("quantlab.evaluation.served.measure",),
    "tasks": ("quantlab.evaluation.tasks.measure",),
    "memory": ("quantlab.evaluation.memory.measure",),
    "speed": ("quantlab.evaluation.speed.measure", "quantlab.evaluation.speed.rates"),
    "attention": ("quantlab.evaluation.memory.attention",),
}
"""The modules that measure each cell. A cell is measured again when code that these modules reach has changed."""


@dataclass(frozen=True)
class _Evaluation:
    """State shared by the steps of one evaluation."""

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
        """Hash of everything that the baseline's predictions and scores depend on."""
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

    def context(self, workers: Workers) -> EvaluationContext:
        return EvaluationContext(
            workers, self.suite, self.predictions, self.scores, self.key, self.request.device, self.progress
        )


def evaluate(request: EvaluationRequest, *, progress: Progress | None = None) -> list[Record]:
    """Measure every artifact and write its record.

    Args:
        request: the artifacts and the suite.
        progress: called at each stage, and with the number of reused records.

    Returns:
        The records, in the order of the artifacts.

    Raises:
        RecipeError: the suite is malformed.
        EvaluationError: the corpus cannot be read, the baseline is not among the artifacts, or no process can be started.
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
    for artifact in missing:  # an interrupted evaluation must not leave outdated records
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
        if artifact.foreign is None:
            check_unchanged(artifact.directory)
    suite = load_suite(request.suite, held_out=request.held_out)
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
    """The results of earlier evaluations that are still valid, by variant."""
    found = {artifact.variant: _earlier(evaluation, artifact) for artifact in evaluation.request.artifacts}
    baseline = evaluation.baseline.variant
    others = [one for variant, one in found.items() if variant != baseline]
    if any(one.quality is None or one.served is None for one in others) and not predictions_complete(
        evaluation.predictions, evaluation.key
    ):
        found[baseline] = replace(found[baseline], quality=None)  # the others need its predictions
    answered = saved_scores(evaluation.scores, evaluation.key)
    tasks = {
        number: result
        for number, result in found[baseline].tasks.items()
        if all(number in one.tasks for one in others) or same_task(result, answered) is not None
    }
    found[baseline] = replace(found[baseline], tasks=tasks)
    return found


def _earlier(evaluation: _Evaluation, artifact: EvaluatedArtifact) -> ArtifactResults:
    """The results in the record of an earlier evaluation, as far as the current code would measure the same."""
    path = evaluation.path(artifact.variant)
    if not evaluation.request.reuse or not path.is_file():
        return ArtifactResults()
    try:
        record = read_record(path)
    except ArtifactError:  # written by another version: measure again
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
    ignored = _DESCRIPTIVE_FIELDS | {"code"}
    if record.model_dump(exclude=ignored) != same.model_dump(exclude=ignored):
        return ArtifactResults()
    changed = {cell for cell, fingerprint in evaluation.code.items() if record.code.get(cell) != fingerprint}
    return reusable_results(evaluation.suite, record).without(changed)


def _measure(evaluation: _Evaluation, missing: list[EvaluatedArtifact], found: dict[str, ArtifactResults]) -> None:
    """Measure the missing cells. Each record is written once everything but its speed is measured; the caller adds the speed."""
    request = evaluation.request
    with Workers(
        evaluation.records / _WORK,
        count=request.side_by_side,
        threads=hardware.threads(),
        time_limit=request.time_limit,
    ) as workers:
        context = evaluation.context(workers)
        turns = SpeedProcesses(
            context,
            {artifact.variant: artifact.directory for artifact in missing if found[artifact.variant].speed is None},
            source=request.artifacts[0].directory,
        )
        preparations, done = turns.preparations(), 0
        for group in _groups(evaluation, missing):
            if not preparations:
                turns.run_due(done / len(missing))
            _measure_group(evaluation, context, group, found, beside=preparations)
            preparations, done = [], done + len(group)
        turns.run_due(1.0)
    for artifact in missing:
        variant = artifact.variant
        known = found[variant]
        failures = _of_speed(turns.failures, variant) + known.failures
        found[variant] = replace(known, speed=turns.speeds.get(variant, known.speed), failures=failures)


def _groups(evaluation: _Evaluation, missing: Sequence[EvaluatedArtifact]) -> list[list[EvaluatedArtifact]]:
    """The artifacts that are measured side by side: the baseline alone and first, then the others, between timing processes."""
    baseline = [[artifact] for artifact in missing if evaluation.is_baseline(artifact)]
    others = [artifact for artifact in missing if not evaluation.is_baseline(artifact)]
    speed = evaluation.suite.suite.speed
    between = max(1, speed.processes - 1) if speed else 1
    size = max(1, min(evaluation.request.side_by_side, -(-len(others) // between)))
    return baseline + [others[start : start + size] for start in range(0, len(others), size)]


def _measure_group(
    evaluation: _Evaluation,
    context: EvaluationContext,
    group: Sequence[EvaluatedArtifact],
    found: dict[str, ArtifactResults],
    *,
    beside: Sequence[Callable[[], None]],
) -> None:
    """Measure everything but the speed of some artifacts, side by side, and write their records.

    Args:
        evaluation: the evaluation.
        context: state shared by all artifacts.
        group: the artifacts.
        found: results by variant, updated.
        beside: further cells, which run beside the first of these artifacts.
    """
    for artifact in group:
        found[artifact.variant] = replace(found[artifact.variant], command=evaluation.request.command, failures=())

    def measure(artifact: EvaluatedArtifact) -> None:
        variant = artifact.variant
        is_baseline = evaluation.is_baseline(artifact)
        found[variant] = measure_artifact(context, variant, artifact.directory, found[variant], is_baseline=is_baseline)

    turn = evaluation.records / _WORK / "memory.lock" if len(group) > 1 else None

    def measure_memory(artifact: EvaluatedArtifact) -> None:
        variant = artifact.variant
        found[variant] = measure_memory_of(context, variant, artifact.directory, found[variant], turn=turn)

    context.workers.side_by_side([*(partial(measure, artifact) for artifact in group), *beside])
    # loading is timed, so nothing else may run beside it
    context.workers.side_by_side([partial(measure_memory, artifact) for artifact in group])
    for artifact in group:
        if evaluation.is_baseline(artifact) and found[artifact.variant].attention is None:
            attention = measure_contexts(
                context.workers,
                context.suite,
                artifact.directory,
                device=context.device,
                progress=context.progress,
            )
            found[artifact.variant] = replace(found[artifact.variant], attention=attention)
        _write(evaluation, _record(evaluation, artifact, found[artifact.variant]))


def _of_speed(failures: Mapping[str, str], variant: str) -> tuple[Failure, ...]:
    return (Failure(cell="speed", reason=failures[variant]),) if variant in failures else ()


def _record(evaluation: _Evaluation, artifact: EvaluatedArtifact, found: ArtifactResults) -> Record:
    request, suite = evaluation.request, evaluation.suite
    manifest = read_manifest(artifact.directory) if artifact.foreign is None else {}
    return Record(
        recipe=request.recipe,
        recipe_sha256=request.recipe_sha256,
        variant=artifact.variant,
        description=artifact.description,
        passes=artifact.passes,
        foreign=artifact.foreign,
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
        engines=read_verdicts(artifact.directory) if artifact.foreign is None else (),
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
    """The default: progress is not shown."""
