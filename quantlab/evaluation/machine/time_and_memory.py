"""The clock and the memory of a device, as cells read them.

On the CPU memory is the resident size of the whole process; Linux can forget its peak, so that the next one is found. On
CUDA it is what torch's allocator holds of tensors, which leaves out the libraries and what the allocator keeps in reserve.

A device is also watched for others: `contention.py` says what counts.
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
"""Seconds after which nothing of this process is left in a GPU's utilization."""
_STATUS: Final = Path("/proc/self/statm")
_FORGET: Final = Path("/proc/self/clear_refs")


def now(device: torch.device) -> float:
    """The time at which everything asked of a device so far is done, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def release_memory() -> None:
    """Free what is no longer used, and let glibc hand it back to the system: what is taken next is then seen to be taken."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def held_bytes(device: torch.device) -> int:
    """Bytes held now; on the CPU the peak so far where nobody says."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if not _STATUS.is_file():
        return peak_bytes(device)
    return int(_STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(device: torch.device) -> int:
    """Most bytes held so far, or since the last peak was forgotten."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, everyone else KiB


def reset_peak(device: torch.device) -> bool:
    """Let a new peak begin at what is held now; whether that can be done."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _FORGET.write_text("5")
    except OSError:
        return False
    return True


def with_contention(work: Callable[[], Work], device: torch.device) -> tuple[Work, str | None]:
    """What `work` gives, and what others did on the device meanwhile, in words; None if too little to matter."""
    before, begin = _others(device), ClockReading.now()
    found = work()
    end = ClockReading.now()
    return found, before or cpu_contention(begin, end, threads=torch.get_num_threads()) or _others(device)


def _others(device: torch.device) -> str | None:
    """What others do on a GPU that this process leaves idle; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    time.sleep(_SAMPLED)
    return gpu_contention(utilization(device))
