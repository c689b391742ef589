"""The columns of the tables: one per metric and, where they apply, per batch size, kind of text, task and machine."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from pydantic import BaseModel

from quantlab.evaluation.measured import Measured
from quantlab.evaluation.metric import Declared, Loss, Metric, Table, Unit, metrics_of
from quantlab.evaluation.quality.metrics import Divergence, Domain
from quantlab.evaluation.record import PARTS, TaskKey, TaskResult
from quantlab.evaluation.speed.metrics import timed_words
from quantlab.report.matrix.matrix import Matrix
from quantlab.report.matrix.rows import Row, Value, batch_sizes, domains_of, task_labels, task_of

Need = Literal["suite", "baseline", "hardware"]

GROUPS: Final = ("quality", "domains", "tasks", *(part for part in PARTS if part != "quality"))
"""Groups of columns that form one table: the parts of a record, quality by kind of text ("domains") and "tasks"."""


@dataclass(frozen=True)
class Column:
    """One column of the tables.

    Attributes:
        key: name in matrix.json, followed by a dot and the batch size, kind of text or task.
        field: path of the number in a record.
        group: one of `GROUPS`.
        metric: its declaration, with heading and meaning filled in.
        path: of the number in the record, as attributes and keys; empty for tasks.
        domain: kind of text, for columns of one kind.
        task: task, for columns of a task.
        machine: the hardware whose numbers it shows; empty for all.
        timed: for columns of speed, the timed model in words.
    """

    key: str
    field: str
    group: str
    metric: Metric
    path: tuple[str, ...] = ()
    domain: str = ""
    task: TaskKey | None = None
    machine: str = ""
    timed: str = ""

    @property
    def heading(self) -> str:
        return self.metric.heading + (f" ({self.machine})" if self.machine else "")

    @property
    def meaning(self) -> str:
        return self.metric.meaning

    @property
    def unit(self) -> Unit:
        return self.metric.unit

    @property
    def better(self) -> Literal["low", "high"]:
        return self.metric.better

    @property
    def relative(self) -> bool:
        return self.metric.relative

    @property
    def is_headline(self) -> bool:
        return "headline" in self.metric.tables

    def is_in(self, *tables: Table) -> bool:
        """Whether the metric is shown in one of these tables."""
        return not set(tables).isdisjoint(self.metric.tables)

    @property
    def noise_key(self) -> str:
        """The key that `rows.noise_of` takes: name and batch size, whatever the machine."""
        return ".".join(self.path[1:])

    @property
    def needs(self) -> tuple[Need, ...]:
        """Properties that two records must share for their numbers to be comparable."""
        needs: list[Need] = [] if self.group == "memory" else ["suite"]
        if self.relative:
            needs.append("baseline")
        if self.group == "speed" or self.metric.of_machine:
            needs.append("hardware")
        return tuple(needs)

    def read(self, row: Row) -> Value:
        """The number of a row; None if it was not measured or belongs to another machine."""
        if self.machine and row.hardware != self.machine:
            return None
        if self.task is not None:
            task = task_of(row, self.task)
            return None if task is None else task.loss if self.relative else task.score
        found: object = row.record
        for step in self.path:
            found = found.get(step) if isinstance(found, Mapping) else getattr(found, step, None)
        assert found is None or isinstance(found, Measured | int | float), f"{self.key} is no number"
        return found


def columns(matrix: Matrix) -> tuple[Column, ...]:
    """All columns after the variant's name: the headline columns, then the details; speed has separate columns per machine."""
    machines = sorted({row.hardware for row in matrix.rows})
    found = columns_of(matrix.rows)
    return found if len(machines) < 2 else tuple(apart for one in found for apart in _by_machine(one, machines))


def columns_of(rows: Sequence[Row]) -> tuple[Column, ...]:
    """All columns that these rows need, without separate columns per machine."""
    by_part = {part: [one for one in _of_part(part, model, rows) if one.metric.tables] for part, model in PARTS.items()}
    every = [one for found in by_part.values() for one in found]
    optional = {part: [one for one in found if not one.metric.always] for part, found in by_part.items()}
    return (
        *(one for one in every if one.is_headline),
        *(one for one in every if one.metric.always and not one.is_headline),
        *optional.pop("quality"),
        *_of_divergence(rows),
        *(one for one in _of_domains(rows) if one.metric.tables),
        *_of_tasks(rows),
        *(one for found in optional.values() for one in found),
    )


def unlisted_of(rows: Sequence[Row]) -> tuple[Column, ...]:
    """The numbers that have no column in any table, for matrix.csv."""
    found = (*(one for part, model in PARTS.items() for one in _of_part(part, model, rows)), *_of_domains(rows))
    return tuple(one for one in found if not one.metric.tables)


def _by_machine(column: Column, machines: Sequence[str]) -> Iterator[Column]:
    """The column itself, or one per machine if its numbers depend on the machine."""
    if "hardware" not in column.needs:
        yield column
        return
    for index, machine in enumerate(machines):
        yield replace(column, key=column.key if index == 0 else f"{column.key}@{machine}", machine=machine)


def _measured(found: Sequence[Column], rows: Sequence[Row]) -> Iterator[Column]:
    """The columns for which any row has a number, and the columns that are always shown."""
    return (one for one in found if one.metric.always or any(one.read(row) is not None for row in rows))


def _of_part(part: str, model: type[BaseModel], rows: Sequence[Row]) -> Iterator[Column]:
    words = timed_words(row.speed.timed for row in rows if row.speed)
    for declared in metrics_of(model).values():
        if declared.by_batch:
            batches = [batch for batch in batch_sizes(rows, declared) if batch != declared.metric.elsewhere]
            found = [_at(declared, part, batch) for batch in batches]
        else:
            found = [_plain(declared, part)]
        if part == "speed":
            found = [
                replace(one, metric=_about(one.metric, timed=words.meaning, short=words.short), timed=words.head)
                for one in found
            ]
        yield from _measured(found, rows)


def _plain(declared: Declared, part: str) -> Column:
    """The column of a metric that is one number."""
    return Column(declared.name, f"{part}.{declared.origin}", part, declared.metric, (part, declared.name))


def _at(declared: Declared, part: str, batch: str) -> Column:
    """The column of a metric at one batch size."""
    name = declared.name
    metric = _about(declared.metric, batch, timed="{timed}", short="{short}")
    return Column(f"{name}.{batch}", f"{part}.{name}.{batch}", part, metric, (part, name, batch))


def _about(metric: Metric, *subject: str, **words: str) -> Metric:
    """The declaration with batch size or kind of text and the timed model filled into its texts."""
    texts = {name: getattr(metric, name).format(*subject, **words) for name in ("heading", "meaning", "head")}
    return replace(metric, **texts)


def _of_divergence(rows: Sequence[Row]) -> Iterator[Column]:
    for name, declared in metrics_of(Divergence).items():
        field, path = f"quality.divergence.{name}", ("quality", "divergence", name)
        yield from _measured([Column(f"divergence.{name}", field, "quality", declared.metric, path)], rows)


def _of_domains(rows: Sequence[Row]) -> Iterator[Column]:
    """The columns of each kind of text, if there are several kinds."""
    domains = domains_of(rows)
    for domain in domains if len(domains) > 1 else ():
        found = [
            Column(
                f"{name}_on.{domain}",
                f"quality.domains.{domain}.{name}",
                "domains",
                _about(declared.metric, domain),
                ("quality", "domains", domain, name),
                domain,
            )
            for name, declared in metrics_of(Domain).items()
        ]
        yield from _measured(found, rows)


def _of_tasks(rows: Sequence[Row]) -> Iterator[Column]:
    """Loss and score of every task, in the order of the suite."""
    tasks = {task.key: task for row in rows for task in row.tasks}
    for key, name in task_labels(tasks.values()).items():
        yield from _of_task(tasks[key], key, name)


def _of_task(task: TaskResult, key: TaskKey, name: str) -> tuple[Column, Column]:
    chance = "" if task.random_baseline is None else f"; guessing gets {100 * task.random_baseline:.0f} %"
    about = f"task {name} {task.version}, {task.n:,} items"
    loss = Metric(
        heading=f"{name}: loss, points",
        meaning=f"Percentage points of {task.metric} lost against the baseline on the same items; {about}.",
        unit="points",
        better="low",
        tables=("details", "cards"),
        head=f"{name}\nloss, pts",
        relative=True,
        loss=Loss(name=f"task {name}", tested="loss"),
    )
    score = Metric(
        heading=f"{name}: {task.metric} %",
        meaning=f"{task.metric.capitalize()}, {about}{chance}.",
        unit="share",
        better="high" if task.higher_is_better else "low",
        tables=("details", "cards"),
    )
    return (
        Column(f"task_loss.{name}", f"tasks.{name}.loss", "tasks", loss, task=key),
        Column(f"task_score.{name}", f"tasks.{name}.score", "tasks", score, task=key),
    )
