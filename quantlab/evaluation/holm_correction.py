"""Holm's correction of the p values of all records of a matrix, and the verdicts on losses that follow from it.

By its own 95 % interval, one in twenty rows that lost nothing would be called a loss. So the verdict is a loss only if the
interval excludes zero and p stays below the level after correction. Every table shows these verdicts.
"""

from collections.abc import Callable, Sequence

from quantlab.evaluation.measured import Measured, Significance, verdict
from quantlab.evaluation.metric import metrics_of
from quantlab.evaluation.quality.metrics import Quality
from quantlab.evaluation.record import Record, TaskKey
from quantlab.evaluation.statistics import holm

Tested = tuple[Measured, Significance]


def with_holm_correction(records: Sequence[Record]) -> list[Record]:
    """The records with `holm_p` and verdicts. Each metric and each task is one family of tests over all rows that have it."""
    measures = sorted({name for record in records if record.quality for name in record.quality.significance})
    tasks = sorted({task.key for record in records for task in record.tasks})
    found = list(records)
    for name in measures:
        found = _with_holm(found, lambda record, name=name: _measure(record, name), _set_measure(name))  # type: ignore[misc]
    for task in tasks:
        found = _with_holm(found, lambda record, task=task: _task(record, task), _set_task(task))  # type: ignore[misc]
    return found


def _with_holm(
    records: Sequence[Record], read: Callable[[Record], Tested | None], write: Callable[[Record, Significance], Record]
) -> list[Record]:
    tested = {index: one for index, record in enumerate(records) if (one := read(record)) is not None}
    found = list(records)
    for index, holm_p in zip(tested, holm([one.p for _, one in tested.values()]), strict=True):
        loss, significance = tested[index]
        judged = significance.model_copy(update={"holm_p": holm_p, "verdict": verdict(loss, holm_p)})
        found[index] = write(found[index], judged)
    return found


def _measure(record: Record, name: str) -> Tested | None:
    quality, declared = record.quality, metrics_of(Quality)[name].metric.loss
    if quality is None or declared is None or name not in quality.significance:
        return None
    loss: Measured | None = getattr(quality, declared.tested)
    return (loss, quality.significance[name]) if loss is not None else None


def _set_measure(name: str) -> Callable[[Record, Significance], Record]:
    def write(record: Record, found: Significance) -> Record:
        assert record.quality is not None, "only called for records with a significance"
        quality = record.quality.model_copy(update={"significance": record.quality.significance | {name: found}})
        return record.model_copy(update={"quality": quality})

    return write


def _task(record: Record, key: TaskKey) -> Tested | None:
    found = next((task for task in record.tasks if task.key == key), None)
    return (found.loss, found.significance) if found and found.significance and found.loss else None


def _set_task(key: TaskKey) -> Callable[[Record, Significance], Record]:
    def write(record: Record, found: Significance) -> Record:
        tasks = tuple(
            task.model_copy(update={"significance": found}) if task.key == key else task for task in record.tasks
        )
        return record.model_copy(update={"tasks": tasks})

    return write
