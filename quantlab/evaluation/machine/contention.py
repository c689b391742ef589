"""Was the machine quiet while something was timed? A number taken among strangers is marked, not printed as fact.

Three signs. Processor time that neither this process nor idleness accounts for went to others; Linux counts it, per
processor, and where it does not the load average has to do. A GPU that is busy while this process leaves it idle, before the
timing or after. And rounds of one cell that differ much from each other. Needs no torch.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np

from quantlab.evaluation.statistics import Floats

_TOLERATED: Final = 0.1
"""Share of the processors used that others may have: system services take less."""
_BUSY_PERCENT: Final = 5
"""Of the last second in which a GPU may be busy with what is not ours: drawing a screen takes less."""
_SPREAD: Final = 0.25
"""Middle half of the rounds over their median, above which a cell is noisy; on a quiet machine it is below 0.1."""
_STAT: Final = Path("/proc/stat")


@dataclass(frozen=True)
class ClockReading:
    """Clocks read together, in seconds.

    Attributes:
        wall: time of day, so to speak.
        own: processor time of this process.
        busy: processor time of everybody on the processors this process may use; None where nobody counts it.
    """

    wall: float
    own: float
    busy: float | None

    @classmethod
    def now(cls) -> Self:
        times = os.times()
        return cls(time.perf_counter(), times.user + times.system, _busy_seconds())


def cpu_contention(begin: ClockReading, end: ClockReading, *, threads: int) -> str | None:
    """What others did between two moments, in words; None if too little to matter.

    Args:
        begin: before the timing.
        end: after it.
        threads: that were timed.
    """
    if begin.busy is None or end.busy is None:
        load = os.getloadavg()[0]
        return f"a load of {load:.1f} on {threads} cores" if load > threads * (1 + _TOLERATED) + 1 else None
    others = (end.busy - begin.busy - (end.own - begin.own)) / (end.wall - begin.wall)
    return f"other processes took {others:.1f} of {threads} cores" if others > _TOLERATED * threads else None


def gpu_contention(percent: int | None) -> str | None:
    """What a GPU's utilization says while this process leaves it idle, in words; None if nothing that matters, or unknown."""
    if percent is None or percent <= _BUSY_PERCENT:
        return None
    return f"other processes kept the GPU busy for {percent} % of the time"


def rounds_spread(rates: Floats) -> str | None:
    """What repeated timings [n] of one cell say against it; None if they agree."""
    first, middle, third = np.quantile(rates, [0.25, 0.5, 0.75])
    share = (third - first) / middle
    return (
        f"the middle half of its {len(rates)} rounds spreads over {100 * share:.0f} % of the median"
        if share > _SPREAD
        else None
    )


def _busy_seconds() -> float | None:
    """Processor time that was not idle, of the processors this process may use, from Linux's counters."""
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
