"""Energy, where the device counts it: NVML's counter of a GPU, RAPL's of the processor packages.

Both count all that the device takes, idle power and strangers included, and are brought up to date a few dozen times a
second, so they are read around a second of steady work, not around a step.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

Meter = Callable[[], float]
"""Joules since some moment in the past."""

_RAPL: Final = Path("/sys/class/powercap")


def meter(device: torch.device) -> Meter | None:
    """The device's counter; None where it has none that may be read."""
    return _nvml(device) if device.type == "cuda" else _rapl()


def utilization(device: torch.device) -> int | None:
    """Percent of the last second at most in which a CUDA device was busy, with whatever it was; None where nobody says."""
    found = _handle(device)
    rates = (ctypes.c_uint * 2)()  # of the processors and of the memory
    if found is None or found[0].nvmlDeviceGetUtilizationRates(found[1], ctypes.byref(rates)):
        return None
    return int(rates[0])


def _handle(device: torch.device) -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    """NVML and what it calls a CUDA device; None where it is missing or does not know the device."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    identifier, handle = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode(), ctypes.c_void_p()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(identifier, ctypes.byref(handle)):
        return None
    return library, handle


def _nvml(device: torch.device) -> Meter | None:
    """The counter of a CUDA device, from Volta on."""
    found = _handle(device)
    if found is None:
        return None
    library, handle = found
    millijoules = ctypes.c_ulonglong()
    if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
        return None

    def read() -> float:
        library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    return read


def _rapl() -> Meter | None:
    """The sum over processor packages; its counters begin anew at a maximum, which is added then."""
    packages = [path for path in sorted(_RAPL.glob("intel-rapl:*")) if path.name.count(":") == 1]
    try:
        ranges = [int((path / "max_energy_range_uj").read_text()) for path in packages]
        before = [int((path / "energy_uj").read_text()) for path in packages]
    except OSError:  # the counters are there, for root alone
        return None
    if not packages:
        return None
    total = 0.0

    def read() -> float:
        nonlocal total
        for index, path in enumerate(packages):
            found = int((path / "energy_uj").read_text())
            total += (found - before[index]) % ranges[index] / 1e6
            before[index] = found
        return total

    return read
