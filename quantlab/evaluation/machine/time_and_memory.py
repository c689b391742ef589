"""Time and memory of a device, as cells measure them.

On the CPU, memory is the resident size of the whole process; Linux can reset its peak. On CUDA, memory is the size of the
tensors allocated by torch, without libraries and without the allocator's reserve.

Timings are also checked for contention by other processes; the criteria are in `contention.py`.
"""

import ctypes
import gc
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import torch

from quantlab.evaluation.machine.contention import ClockReading, cpu_contention, gpu_contention
from quantlab.evaluation.machine.energy import utilization

Work = TypeVar("Work")
_SAMPLED: Final = 1.2
"""Seconds of idleness after which a GPU's reported utilization no longer contains work of this process."""
_STATUS: Final = Path("/proc/self/statm")
_FORGET: Final = Path("/proc/self/clear_refs")


def now(device: torch.device) -> float:
    """Wait for all work queued on the device, then read the clock, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def release_memory() -> None:
    """Collect garbage and make glibc return free memory to the system, so that later allocations show in the resident size."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def held_bytes(device: torch.device) -> int:
    """Bytes in use now; on a CPU without /proc, the peak so far."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if not _STATUS.is_file():
        return peak_bytes(device)
    return int(_STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(device: torch.device) -> int:
    """Peak bytes in use since the process started, or since the last `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def reset_peak(device: torch.device) -> bool:
    """Reset the peak to the bytes in use now; returns whether the system supports it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _FORGET.write_text("5")
    except OSError:
        return False
    return True


def with_contention(work: Callable[[], Work], device: torch.device) -> tuple[Work, str | None]:
    """Run `work`; returns its result and a description of contention by other processes, None if there was none."""
    before, begin = _others(device), ClockReading.now()
    found = work()
    end = ClockReading.now()
    return found, before or cpu_contention(begin, end, threads=torch.get_num_threads()) or _others(device)


def _others(device: torch.device) -> str | None:
    """Describe the use of a GPU by other processes while this process leaves it idle; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    time.sleep(_SAMPLED)
    return gpu_contention(utilization(device))
