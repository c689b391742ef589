"""Energy meters: NVML's counter of a GPU, and the RAPL counters of the CPU packages.

Both count the total energy of the device, including idle power and other processes. They are updated a few dozen times per
second, so they are read before and after about a second of steady work, not around single steps.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

Meter = Callable[[], float]
"""Returns the energy in joules since an arbitrary moment in the past."""

_RAPL: Final = Path("/sys/class/powercap")


def meter(device: torch.device) -> Meter | None:
    """The energy meter of the device; None if it has no readable counter."""
    return _nvml(device) if device.type == "cuda" else _rapl()


def utilization(device: torch.device) -> int | None:
    """Utilization of a CUDA device by all processes in percent, over at most the last second; None if NVML does not report it."""
    found = _handle(device)
    rates = (ctypes.c_uint * 2)()  # GPU and memory utilization
    if found is None or found[0].nvmlDeviceGetUtilizationRates(found[1], ctypes.byref(rates)):
        return None
    return int(rates[0])


def _handle(device: torch.device) -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    """The NVML library and its handle of a CUDA device; None if NVML is missing or does not know the device."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    identifier, handle = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode(), ctypes.c_void_p()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(identifier, ctypes.byref(handle)):
        return None
    return library, handle


def _nvml(device: torch.device) -> Meter | None:
    """The energy counter of a CUDA device; available since Volta."""
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
    """The sum of the counters of all CPU packages; a counter that wraps around at its maximum is corrected."""
    packages = [path for path in sorted(_RAPL.glob("intel-rapl:*")) if path.name.count(":") == 1]
    try:
        ranges = [int((path / "max_energy_range_uj").read_text()) for path in packages]
        before = [int((path / "energy_uj").read_text()) for path in packages]
    except OSError:  # only root may read the counters
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
