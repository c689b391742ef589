"""The verdicts on the losses of a row, in words. They come from the records (`evaluation.holm_correction`), not from the report."""

from collections.abc import Iterator

from quantlab.evaluation.measured import Measured, Significance, Verdict, verdict
from quantlab.evaluation.metric import metrics_of
from quantlab.evaluation.quality.metrics import Quality
from quantlab.report.matrix.rows import Row, task_labels


def significance_of(row: Row, name: str) -> Significance | None:
    """The significance of a metric's change against the baseline; None if it was not tested."""
    return row.quality.significance.get(name) if row.quality else None


def judge(measured: Measured | None, significance: Significance | None) -> Verdict | None:
    """The verdict on one loss (positive is worse); None if it was not measured or has no 95 % interval.

    If a record has no significance, the interval alone decides.
    """
    if measured is None or measured.interval == "range":
        return None
    return significance.verdict if significance else verdict(measured)


def verdicts(row: Row) -> dict[str, Verdict]:
    """The verdict on every measured loss of a row, by the name of the loss: "accuracy", "perplexity", "task retrieval"."""
    return {name: said for name, said in (*_of_text(row), *_of_tasks(row)) if said is not None}


def _of_text(row: Row) -> Iterator[tuple[str, Verdict | None]]:
    for name, declared in metrics_of(Quality).items():
        if declared.metric.loss is not None:
            yield declared.metric.loss.name, judge(row.measured(name), significance_of(row, name))


def _of_tasks(row: Row) -> Iterator[tuple[str, Verdict | None]]:
    labels = task_labels(row.tasks)
    for task in row.tasks:
        yield f"task {labels[task.key]}", judge(task.loss, task.significance)


def summary(row: Row) -> str | None:
    """All verdicts of a row in a few words: "loss: perplexity, 2 of 5 tasks"; None where no loss was measured."""
    if not verdicts(row):
        return None
    lost = [name for name, said in _of_text(row) if said == "loss"]
    tasks = sum(said == "loss" for _, said in _of_tasks(row))
    if tasks:
        lost.append(f"{tasks} of {len(row.tasks)} tasks")
    return f"loss: {', '.join(lost)}" if lost else "no measurable loss"


def tested(row: Row) -> bool:
    """Whether the verdicts use p values corrected for the number of rows."""
    return row.quality is not None and any(found.holm_p is not None for found in row.quality.significance.values())
