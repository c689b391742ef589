"""The cells of one artifact, measured one after the other. Known results are kept; a failed cell stores its reason.

Every cell runs in its own process (`worker.py`). The tasks of an artifact share a process, because loading the model takes
longer than many tasks. Each task has its own time limit and its answer is sent as soon as it is complete. If a task crashes the
process, a new process answers the remaining tasks. Artifacts may be measured side by side (`workers.py`).
"""

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quantlab.evaluation.memory.metrics import Memory
from quantlab.evaluation.processes.messages import (
    MemoryRequest,
    Progress,
    QualityRequest,
    QualityResult,
    Role,
    ServedRequest,
    SpeedRequest,
    SpeedResult,
    TaskAnswer,
    TasksRequest,
    TasksResult,
    predictions_complete,
)
from quantlab.evaluation.processes.worker_client import CellError, invalid_answer
from quantlab.evaluation.processes.workers import Workers
from quantlab.evaluation.quality.metrics import Quality
from quantlab.evaluation.record import Attention, Failure, Record, TaskResult
from quantlab.evaluation.served.metrics import Served
from quantlab.evaluation.speed.metrics import Speed
from quantlab.evaluation.speed.rates import speeds_of
from quantlab.evaluation.suite import LoadedSuite, SpeedSuite, TaskRun


@dataclass
class EvaluationContext:
    """State that the measurements of all artifacts of an evaluation share.

    Attributes:
        workers: run the cells.
        suite: the suite.
        predictions: directory of the baseline's predictions.
        scores: file of the baseline's task scores.
        key: hash of everything that the baseline's predictions and scores depend on.
        device: device of the models.
        progress: called at each stage.
        baseline_failure: the reason why the baseline has no predictions; None if it has them.
    """

    workers: Workers
    suite: LoadedSuite
    predictions: Path
    scores: Path
    key: str
    device: str
    progress: Progress
    baseline_failure: str | None = None


@dataclass(frozen=True)
class ArtifactResults:
    """The results of one artifact; a part is None if it was not measured or failed.

    Attributes:
        tasks: task results by their index in `LoadedSuite.runs`.
        command: command line of the last run that measured.
        failures: failed cells with their reasons.
    """

    quality: Quality | None = None
    served: Served | None = None
    tasks: Mapping[int, TaskResult] = field(default_factory=dict)
    memory: Memory | None = None
    speed: Speed | None = None
    attention: Attention | None = None
    command: str = ""
    failures: tuple[Failure, ...] = ()

    def without(self, cells: Collection[str]) -> "ArtifactResults":
        """The same results without those of `cells`."""
        empty: dict[str, Any] = dict.fromkeys(cells) | ({"tasks": {}} if "tasks" in cells else {})
        return replace(self, **empty)

    def is_incomplete(self, suite: LoadedSuite, *, is_baseline: bool) -> bool:
        """Whether the suite asks for a cell that is not measured yet."""
        return (
            self.quality is None
            or self.served is None
            or self.memory is None
            or len(self.tasks) < len(suite.runs)
            or (self.speed is None and suite.suite.speed is not None)
            or (self.attention is None and suite.suite.attention is not None and is_baseline)
        )


def reusable_results(suite: LoadedSuite, record: Record) -> ArtifactResults:
    """The results of a record without its failed cells, which are measured again."""
    failed = {failure.cell for failure in record.failures}
    is_baseline = record.variant == record.baseline
    answered = [task for task in record.tasks if is_baseline or task.loss is not None]
    tasks: dict[int, TaskResult] = {}
    for number, run in enumerate(suite.runs):
        result = next((task for task in answered if _is_of(run, task)), None)
        if result is not None:
            answered.remove(result)
            tasks[number] = result
    return ArtifactResults(
        quality=record.quality if "quality" not in failed else None,
        served=record.served if is_baseline or (record.served and record.served.served_kl_to_baseline) else None,
        tasks=tasks,
        memory=record.memory,
        speed=record.speed,
        attention=record.attention,
        command=record.command,
    )


def _is_of(run: TaskRun, task: TaskResult) -> bool:
    return (
        (task.name, task.seed) == (run.name, run.seed)
        and run.metric in {None, task.metric}
        and run.wanted.shots in {None, task.shots}
    )


class SpeedProcesses:
    """The processes that time the speed of all artifacts together, because ratios are taken within interleaved rounds.

    They alternate with the other cells and so are spread over the whole evaluation. Their variation then includes the drift of
    the machine over minutes, which also separates two evaluations. If the other cells are known, they run one after the other.

    Attributes:
        speeds: the speed of every variant, once all processes have run.
        failures: the reason why a variant has no speed.
    """

    def __init__(self, context: EvaluationContext, artifacts: Mapping[str, Path], source: Path) -> None:
        """Start no process yet.

        Args:
            context: state shared by all artifacts.
            artifacts: variant -> directory, for the artifacts to time.
            source: checkpoint that is timed in float16 as the FP16 reference if no artifact is in float16.
        """
        self.speeds: Mapping[str, Speed] = {}
        self.failures: Mapping[str, str] = {}
        self._context = context
        self._artifacts = dict(artifacts)
        self._suite = context.suite.suite.speed if artifacts else None
        self._results: list[SpeedResult] = []
        self._request = SpeedRequest(
            suite=context.suite.path, artifacts=self._artifacts, source=source, device=context.device
        )

    def preparations(self) -> list[Callable[[], None]]:
        """Calls that compile the kernels of the timed models, each in its own process; empty if cells run one by one.

        Without them the first timing process compiles the kernels of all models one after the other.
        """
        if self._suite is None or self._context.workers.count == 1:
            return []
        return [partial(self._prepare, variant) for variant in self._artifacts]

    def _prepare(self, variant: str) -> None:
        request = self._request.model_copy(update={"only_prepare": variant})
        with contextlib.suppress(CellError):  # timing meets the same error and records it
            self._context.workers.run(f"speed-{variant}", request, SpeedResult, progress=_silent)

    def run_due(self, done: float) -> None:
        """Run the processes that are due when the share `done` of the artifacts is measured: the first at 0, the last at 1."""
        while self._suite is not None and not self.failures and len(self._results) < self._suite.processes:
            if len(self._results) > done * (self._suite.processes - 1):
                return
            self._time(self._suite)

    def _time(self, suite: SpeedSuite) -> None:
        process = len(self._results)
        timed = self._results[0].timed if self._results else None
        request = self._request.model_copy(update={"timed": timed, "process": process})

        def progress(stage: str, done: int, total: int) -> None:
            self._context.progress(f"speed, process {process + 1}: {stage}", done, total)

        try:
            self._results.append(self._context.workers.run(f"speed-{process}", request, SpeedResult, progress=progress))
        except CellError as error:
            self.failures = dict.fromkeys(self._artifacts, str(error))
            return
        if len(self._results) == suite.processes:
            self.failures = {variant: why for result in self._results for variant, why in result.failures.items()}
            self.speeds = speeds_of(suite, self._results)


def measure_artifact(
    context: EvaluationContext, variant: str, directory: Path, found: ArtifactResults, *, is_baseline: bool
) -> ArtifactResults:
    """Measure the missing cells among quality, served path and tasks.

    Args:
        context: state shared by all artifacts.
        variant: name of the row.
        directory: the artifact.
        found: its known results.
        is_baseline: whether the other artifacts are compared with it.
    """
    failures = list(found.failures)
    if found.quality is None:
        found = replace(found, quality=_quality(context, variant, directory, failures, is_baseline=is_baseline))
    if found.served is None:
        found = replace(found, served=_served(context, variant, directory, failures, is_baseline=is_baseline))
    if len(found.tasks) < len(context.suite.runs):
        answers = _tasks(context, variant, directory, found.tasks, is_baseline=is_baseline)
        failures += _failed_tasks(context.suite.runs, answers)
        answered = {answer.run: answer.result for answer in answers if answer.result is not None}
        found = replace(found, tasks={**found.tasks, **answered})
    return replace(found, failures=tuple(failures))


def measure_memory_of(
    context: EvaluationContext, variant: str, directory: Path, found: ArtifactResults, *, turn: Path | None
) -> ArtifactResults:
    """Measure the memory unless it is known.

    Args:
        context: state shared by all artifacts.
        variant: name of the row.
        directory: the artifact.
        found: its known results.
        turn: as in `MemoryRequest`.
    """
    if found.memory is not None:
        return found
    request = MemoryRequest(directory=directory, suite=context.suite.path, turn=turn, device=context.device)
    try:
        return replace(found, memory=context.workers.run(f"{variant}-memory", request, Memory, progress=_silent))
    except CellError as error:
        return replace(found, failures=(*found.failures, Failure(cell="memory", reason=str(error))))


def _quality(
    context: EvaluationContext, variant: str, directory: Path, failures: list[Failure], *, is_baseline: bool
) -> Quality | None:
    role: Role = "baseline" if is_baseline else "compared" if context.baseline_failure is None else "alone"
    request = QualityRequest(
        directory=directory,
        suite=context.suite.path,
        held_out=context.suite.held_out,
        predictions=context.predictions,
        role=role,
        key=context.key,
        device=context.device,
    )

    def progress(_: str, done: int, total: int) -> None:
        """Show all stages as one bar per artifact."""
        context.progress(f"{variant}: quality", done, total)

    try:
        found = context.workers.run(f"{variant}-quality", request, QualityResult, progress=progress)
    except CellError as error:
        failures.append(Failure(cell="quality", reason=str(error)))
        if is_baseline:
            context.baseline_failure = str(error)
        return None
    if role == "alone":
        reason = f"nothing to compare with: the baseline failed: {context.baseline_failure}"
        failures.append(Failure(cell="quality", reason=reason))
    failures += [Failure(cell="quality", reason=f"{part}: {why}") for part, why in found.failures.items()]
    return found.quality


def _served(
    context: EvaluationContext, variant: str, directory: Path, failures: list[Failure], *, is_baseline: bool
) -> Served | None:
    alone = is_baseline or not predictions_complete(context.predictions, context.key)
    request = ServedRequest(
        directory=directory,
        suite=context.suite.path,
        held_out=context.suite.held_out,
        predictions=None if alone else context.predictions,
        device=context.device,
    )

    def progress(_: str, done: int, total: int) -> None:
        context.progress(f"{variant}: served path", done, total)

    try:
        return context.workers.run(f"{variant}-served", request, Served, progress=progress)
    except CellError as error:
        failures.append(Failure(cell="served", reason=str(error)))
        return None


def _tasks(
    context: EvaluationContext, variant: str, directory: Path, known: Mapping[int, TaskResult], *, is_baseline: bool
) -> list[TaskAnswer]:
    """An answer for every task run that is not known."""
    answers: dict[int, TaskAnswer] = {}
    left = tuple(number for number in range(len(context.suite.runs)) if number not in known)
    while left:
        request = TasksRequest(
            directory=directory,
            suite=context.suite.path,
            runs=left,
            scores=context.scores,
            role="baseline" if is_baseline else "compared",
            key=context.key,
            device=context.device,
        )
        answers |= {answer.run: answer for answer in _run_tasks(context, variant, request)}
        left = tuple(number for number in left if number not in answers)
    return [answers[number] for number in sorted(answers)]


def _run_tasks(context: EvaluationContext, variant: str, request: TasksRequest) -> list[TaskAnswer]:
    """The answers of one process, at least one. The task that crashed it gets the reason as its answer."""
    received: list[TaskAnswer] = []

    def progress(_: str, done: int, total: int) -> None:
        context.progress(f"{variant}: tasks", done, total)

    def receive(text: str) -> None:
        try:
            received.append(TaskAnswer.model_validate_json(text))
        except ValidationError as error:
            received.append(TaskAnswer(run=received[-1].run, reason=invalid_answer(error)))

    lost: Sequence[int] = ()
    reason = ""
    try:
        context.workers.run(f"{variant}-tasks", request, TasksResult, progress=progress, part=receive)
    except CellError as error:
        reason = str(error)
        lost = (
            (received[-1].run,) if received else request.runs
        )  # it failed before the first task: no task can be answered
    answers = {answer.run: answer for answer in received if answer.result is not None or answer.reason is not None}
    failed = {number: TaskAnswer(run=number, reason=reason) for number in lost}
    return list((failed | answers).values())


def _failed_tasks(runs: Sequence[TaskRun], answers: Sequence[TaskAnswer]) -> list[Failure]:
    """One failure per reason, listing the tasks that failed for it."""
    names: dict[str, list[str]] = {}
    for answer in answers:
        if answer.reason is not None:
            run = runs[answer.run]
            seed = f", seed {run.seed}" if len(run.wanted.seeds) > 1 else ""
            names.setdefault(answer.reason, []).append(run.name + seed)
    return [Failure(cell="tasks", reason=f"{'; '.join(which)}: {why}") for why, which in names.items()]


def _silent(stage: str, done: int, total: int) -> None:
    """Too short for a progress bar."""
