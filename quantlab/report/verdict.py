"""What a row's intervals say of its losses: "no measurable loss" only where zero lies inside.

With many rows, one in twenty of those that lost nothing would be called a loss by its own 95 % interval. Where a record
has p values adjusted over the rows (Holm 1979), these decide instead.
"""

from collections.abc import Iterator

from quantlab.evaluation.record import Measured, Significance, Verdict
from quantlab.report.rows import Row

LEVEL = 0.05


def judge(measured: Measured | None, significance: Significance | None) -> Verdict | None:
    """What one loss says; positive is worse. None where it was not measured."""
    if measured is None:
        return None
    holm_p = significance.holm_p if significance else None
    if measured.low <= 0 <= measured.high or (holm_p is not None and holm_p > LEVEL):
        return "no measurable loss"
    return "loss" if measured.value > 0 else "gain"


def verdicts(row: Row) -> dict[str, Verdict]:
    """The verdict on every measured loss of a row, by what was lost: "accuracy", "perplexity", "task retrieval"."""
    return {name: verdict for name, verdict in _verdicts(row) if verdict is not None}


def _verdicts(row: Row) -> Iterator[tuple[str, Verdict | None]]:
    yield "accuracy", judge(row.accuracy_loss_percent, row.significance.get("accuracy_loss_percent"))
    yield "perplexity", judge(row.perplexity_change_percent, row.significance.get("perplexity_change_percent"))
    for task in row.tasks:
        yield f"task {task.name}", judge(task.loss, task.significance)


def summary(row: Row) -> str | None:
    """All verdicts of a row in a few words: "loss: perplexity, 2 of 5 tasks"; None where no loss was measured."""
    found = verdicts(row)
    if not found:
        return None
    lost = [name for name, verdict in found.items() if verdict == "loss" and not name.startswith("task ")]
    tasks = sum(verdict == "loss" and name.startswith("task ") for name, verdict in found.items())
    if tasks:
        lost.append(f"{tasks} of {len(row.tasks)} tasks")
    return f"loss: {', '.join(lost)}" if lost else "no measurable loss"


def tested(row: Row) -> bool:
    """Whether the verdicts rest on p values adjusted over the rows."""
    return any(found.holm_p is not None for found in row.significance.values())
