"""Detection of contention: whether other processes used the machine during a timing. Such a number is marked as noisy.

There are three indications. First, CPU time that was neither idle nor used by this process; Linux counts it per processor, and
on other systems the load average replaces it. Second, a GPU that is busy while this process leaves it idle, before or after the
timing. Third, a large spread between the rounds of one cell. Needs no torch.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np

from quantlab.evaluation.statistics import Floats

_TOLERATED: Final = 0.1
"""Tolerated share of the timed processors that other processes use; system services use less."""
_BUSY_PERCENT: Final = 5
"""Tolerated utilization of a GPU by other processes in the last second, in percent; drawing a screen takes less."""
_SPREAD: Final = 0.25
"""Interquartile range over the median of the rounds, above which a cell is noisy; below 0.1 on a quiet machine."""
_STAT: Final = Path("/proc/stat")


@dataclass(frozen=True)
class ClockReading:
    """Clocks read at one moment, in seconds.

    Attributes:
        wall: monotonic wall clock.
        own: CPU time of this process.
        busy: CPU time of all processes on the processors that this process may use; None if the system does not count it.
    """

    wall: float
    own: float
    busy: float | None

    @classmethod
    def now(cls) -> Self:
        times = os.times()
        return cls(time.perf_counter(), times.user + times.system, _busy_seconds())


def cpu_contention(begin: ClockReading, end: ClockReading, *, threads: int) -> str | None:
    """Describe the use of the CPU by other processes between two readings; None if it is below the tolerance.

    Args:
        begin: reading before the timing.
        end: reading after it.
        threads: number of timed threads.
    """
    if begin.busy is None or end.busy is None:
        load = os.getloadavg()[0]
        return f"a load of {load:.1f} on {threads} cores" if load > threads * (1 + _TOLERATED) + 1 else None
    others = (end.busy - begin.busy - (end.own - begin.own)) / (end.wall - begin.wall)
    return f"other processes took {others:.1f} of {threads} cores" if others > _TOLERATED * threads else None


def gpu_contention(percent: int | None) -> str | None:
    """Describe the use of a GPU by other processes, from its utilization in percent while this process leaves it idle.

    None if the utilization is unknown or below the tolerance.
    """
    if percent is None or percent <= _BUSY_PERCENT:
        return None
    return f"other processes kept the GPU busy for {percent} % of the time"


def rounds_spread(rates: Floats) -> str | None:
    """Describe the spread of the rounds [n] of one cell; None if it is below the tolerance."""
    first, middle, third = np.quantile(rates, [0.25, 0.5, 0.75])
    share = (third - first) / middle
    return (
        f"the middle half of its {len(rates)} rounds spreads over {100 * share:.0f} % of the median"
        if share > _SPREAD
        else None
    )


def _busy_seconds() -> float | None:
    """Non-idle time of the processors that this process may use, in seconds, from /proc/stat; None on other systems."""
    if not _STAT.is_file() or not hasattr(os, "sched_getaffinity"):
        return None
    allowed = {f"cpu{index}" for index in os.sched_getaffinity(0)}
    ticks = 0
    for line in _STAT.read_text().splitlines():
        name, *counts = line.split()
        if name in allowed:
            user, nice, system, _idle, _waiting, interrupts, soft, stolen = (int(count) for count in counts[:8])
            ticks += user + nice + system + interrupts + soft + stolen
    return ticks / os.sysconf("SC_CLK_TCK")
