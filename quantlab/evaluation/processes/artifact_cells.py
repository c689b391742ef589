"""One artifact's cells, one after the other: what is known already is kept, what fails is a failure with its reason.

A cell is a process of its own (`worker.py`). The tasks of an artifact share one, because loading the model takes longer than
many a task; each is told as soon as it is answered, with a time limit of its own. One that ends the process costs itself
alone: a new process answers the rest.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quantlab.evaluation.memory.metrics import Memory
from quantlab.evaluation.processes.attention_cells import measure_contexts
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
from quantlab.evaluation.processes.worker_client import CellError, Worker, invalid_answer
from quantlab.evaluation.quality.metrics import Quality
from quantlab.evaluation.record import Attention, Failure, Record, TaskResult
from quantlab.evaluation.served.metrics import Served
from quantlab.evaluation.speed.metrics import Speed
from quantlab.evaluation.speed.rates import speeds_of
from quantlab.evaluation.suite import LoadedSuite, SpeedSuite, TaskRun


@dataclass
class EvaluationContext:
    """What measuring an artifact takes from the whole evaluation.

    Attributes:
        worker: runs the cells.
        suite: what is measured.
        predictions: directory of the baseline's predictions.
        scores: file of the baseline's answers to tasks.
        key: names the baseline and all that its answers depend on.
        device: where models compute.
        progress: told of each stage.
        baseline_failure: why the baseline has no predictions; None if it has.
    """

    worker: Worker
    suite: LoadedSuite
    predictions: Path
    scores: Path
    key: str
    device: str
    progress: Progress
    baseline_failure: str | None = None


@dataclass(frozen=True)
class ArtifactResults:
    """What is known of one artifact; None is what has not been measured, or failed.

    Attributes:
        tasks: results by the number of their run in the suite.
        command: of the run that measured last.
        failures: why something is missing.
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
        """The same without what these cells measured."""
        empty: dict[str, Any] = dict.fromkeys(cells) | ({"tasks": {}} if "tasks" in cells else {})
        return replace(self, **empty)

    def is_incomplete(self, suite: LoadedSuite, *, is_baseline: bool) -> bool:
        """Whether anything the suite asks for is still to be measured."""
        return (
            self.quality is None
            or self.served is None
            or self.memory is None
            or len(self.tasks) < len(suite.runs)
            or (self.speed is None and suite.suite.speed is not None)
            or (self.attention is None and suite.suite.attention is not None and is_baseline)
        )


def reusable_results(suite: LoadedSuite, record: Record) -> ArtifactResults:
    """What a record holds, less whatever had failed and may be tried again."""
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
    """The speed of all artifacts at once, because ratios are taken within interleaved rounds; its processes take turns with the rows.

    Spread over the whole evaluation they differ by what a machine does in minutes, which another evaluation will differ by too;
    where rows are known from before, the processes come one after the other.

    Attributes:
        speeds: of every variant, once all processes have had their turn.
        failures: why a variant has no speed.
    """

    def __init__(self, context: EvaluationContext, artifacts: Mapping[str, Path], source: Path) -> None:
        """Prepare.

        Args:
            context: shared by all rows.
            artifacts: variant -> directory, of those whose speed is wanted.
            source: the checkpoint that in float16 is the FP16 side where no artifact is.
        """
        self.speeds: Mapping[str, Speed] = {}
        self.failures: Mapping[str, str] = {}
        self._bench = context
        self._artifacts, self._source = dict(artifacts), source
        self._suite = context.suite.suite.speed if artifacts else None
        self._results: list[SpeedResult] = []

    def run_due(self, done: float) -> None:
        """Run the processes whose turn has come when this share of the rows is done: the first before all, the last after."""
        while self._suite is not None and not self.failures and len(self._results) < self._suite.processes:
            if len(self._results) > done * (self._suite.processes - 1):
                return
            self._time(self._suite)

    def _time(self, suite: SpeedSuite) -> None:
        process = len(self._results)
        request = SpeedRequest(
            suite=self._bench.suite.path,
            artifacts=self._artifacts,
            source=self._source,
            timed=self._results[0].timed if self._results else None,
            process=process,
            device=self._bench.device,
        )

        def progress(stage: str, done: int, total: int) -> None:
            self._bench.progress(f"speed, process {process + 1}: {stage}", done, total)

        try:
            self._results.append(self._bench.worker.run(f"speed-{process}", request, SpeedResult, progress=progress))
        except CellError as error:
            self.failures = dict.fromkeys(self._artifacts, str(error))
            return
        if len(self._results) == suite.processes:
            self.failures = {variant: why for result in self._results for variant, why in result.failures.items()}
            self.speeds = speeds_of(suite, self._results)


def measure_artifact(
    context: EvaluationContext, variant: str, directory: Path, found: ArtifactResults, *, is_baseline: bool
) -> ArtifactResults:
    """Quality, served path, tasks and memory of one artifact, of the baseline also attention; only what is not known yet.

    Args:
        context: shared by all rows.
        variant: names the row.
        directory: the artifact.
        found: what is known.
        is_baseline: whether the others are compared with it.
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
    if found.memory is None:
        request = MemoryRequest(directory=directory, suite=context.suite.path, device=context.device)
        try:
            memory = context.worker.run(f"{variant}-memory", request, Memory, progress=_silent)
            found = replace(found, memory=memory)
        except CellError as error:
            failures.append(Failure(cell="memory", reason=str(error)))
    if is_baseline and found.attention is None:
        attention = measure_contexts(
            context.worker, context.suite, directory, device=context.device, progress=context.progress
        )
        found = replace(found, attention=attention)
    return replace(found, failures=tuple(failures))


def _quality(
    context: EvaluationContext, variant: str, directory: Path, failures: list[Failure], *, is_baseline: bool
) -> Quality | None:
    role: Role = "baseline" if is_baseline else "compared" if context.baseline_failure is None else "alone"
    request = QualityRequest(
        directory=directory,
        suite=context.suite.path,
        predictions=context.predictions,
        role=role,
        key=context.key,
        device=context.device,
    )

    def progress(_: str, done: int, total: int) -> None:
        """One bar per row, whatever it is busy with."""
        context.progress(f"{variant}: quality", done, total)

    try:
        found = context.worker.run(f"{variant}-quality", request, QualityResult, progress=progress)
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
        predictions=None if alone else context.predictions,
        device=context.device,
    )

    def progress(_: str, done: int, total: int) -> None:
        context.progress(f"{variant}: served path", done, total)

    try:
        return context.worker.run(f"{variant}-served", request, Served, progress=progress)
    except CellError as error:
        failures.append(Failure(cell="served", reason=str(error)))
        return None


def _tasks(
    context: EvaluationContext, variant: str, directory: Path, known: Mapping[int, TaskResult], *, is_baseline: bool
) -> list[TaskAnswer]:
    """An answer for every run that is not known."""
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
        answers |= {answer.run: answer for answer in _asked(context, variant, request)}
        left = tuple(number for number in left if number not in answers)
    return [answers[number] for number in sorted(answers)]


def _asked(context: EvaluationContext, variant: str, request: TasksRequest) -> list[TaskAnswer]:
    """The answers of one process, at least one; that of the task which ended it is why."""
    told: list[TaskAnswer] = []

    def progress(_: str, done: int, total: int) -> None:
        context.progress(f"{variant}: tasks", done, total)

    def hear(text: str) -> None:
        try:
            told.append(TaskAnswer.model_validate_json(text))
        except ValidationError as error:
            told.append(TaskAnswer(run=told[-1].run, reason=invalid_answer(error)))

    lost: Sequence[int] = ()
    reason = ""
    try:
        context.worker.run(f"{variant}-tasks", request, TasksResult, progress=progress, part=hear)
    except CellError as error:
        reason = str(error)
        lost = (told[-1].run,) if told else request.runs  # before the first was begun: none can be answered
    answers = {answer.run: answer for answer in told if answer.result is not None or answer.reason is not None}
    failed = {number: TaskAnswer(run=number, reason=reason) for number in lost}
    return list((failed | answers).values())


def _failed_tasks(runs: Sequence[TaskRun], answers: Sequence[TaskAnswer]) -> list[Failure]:
    """One failure for every reason, with the tasks it is the reason of."""
    names: dict[str, list[str]] = {}
    for answer in answers:
        if answer.reason is not None:
            run = runs[answer.run]
            seed = f", seed {run.seed}" if len(run.wanted.seeds) > 1 else ""
            names.setdefault(answer.reason, []).append(run.name + seed)
    return [Failure(cell="tasks", reason=f"{'; '.join(which)}: {why}") for why, which in names.items()]


def _silent(stage: str, done: int, total: int) -> None:
    """A moment's work."""
