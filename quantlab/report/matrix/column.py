"""One column of the tables: what it is called, what its head means, and where its numbers stand in a record."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from quantlab.evaluation.record import Measured, TaskKey
from quantlab.report.matrix.rows import Row

Unit = Literal[
    "percent", "change", "ratio", "plain", "nats", "share", "points", "bytes", "seconds", "milliseconds", "rate"
]
Group = Literal["quality", "domains", "tasks", "memory", "speed"]
"""Columns that stand in one table; "domains": quality by kind of text."""
Phase = Literal["decode", "prefill"]
Need = Literal["suite", "baseline", "hardware"]

HEADLINE = ("accuracy_loss_percent", "memory_percent_of_fp16", "speed_over_fp16")
"""The columns that decide."""


@dataclass(frozen=True)
class Column:
    """One column of the tables."""

    key: str
    """Name in matrix.json, with the batch size or task behind a dot."""
    field: str
    """Where the number stands in a record."""
    heading: str
    meaning: str
    """One sentence for people."""
    group: Group
    unit: Unit
    read: Callable[[Row], Measured | float | None]
    better: Literal["low", "high"]
    relative: bool = False
    """Compares with the baseline, so the baseline itself has none."""
    task: TaskKey | None = None
    """Of columns of a task: which."""
    of_machine: bool = False
    """Depends on the hardware it was measured on."""

    @property
    def needs(self) -> tuple[Need, ...]:
        """What two records must share for their numbers to be comparable."""
        needs: list[Need] = [] if self.group == "memory" else ["suite"]
        if self.relative:
            needs.append("baseline")
        if self.group == "speed" or self.of_machine:
            needs.append("hardware")
        return tuple(needs)
