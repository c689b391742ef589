"""Selects the device of a model and checks that it is supported and has enough free memory."""

from pathlib import Path
from typing import Final

import torch

from quantlab.errors import DeviceError

_LEAST_CAPABILITY: Final = (8, 0)
"""Compute capability of the first GPUs with bfloat16 tensor cores, which all kernels use."""
_MEMORY_FILE: Final = Path("/proc/meminfo")


def find_device(name: str | torch.device) -> torch.device:
    """The device for a name.

    Names are "cpu", "cuda" for the current CUDA device, "cuda:1", or "auto" for "cuda" if available and else "cpu".

    Raises:
        DeviceError: the device does not exist or is not supported.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise _no_device(name, str(error).splitlines()[0]) from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise _no_device(name, f"a device of type {device.type}")
    if not torch.cuda.is_available():
        built = f"torch {torch.__version__} built without CUDA" if torch.version.cuda is None else "no usable GPU"
        raise _no_device(name, built)
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise _no_device(name, f"{count} CUDA device{'s' if count > 1 else ''}")
    capability = torch.cuda.get_device_capability(index)
    if capability < _LEAST_CAPABILITY:
        raise DeviceError(
            "the runtime does not support this GPU",
            where=f"device {name}, {torch.cuda.get_device_name(index)}",
            found=f"compute capability {capability[0]}.{capability[1]}",
            fix="use compute capability {}.{} or newer (A100 and later), or the CPU".format(*_LEAST_CAPABILITY),
        )
    return torch.device("cuda", index)


def _no_device(name: str | torch.device, found: str) -> DeviceError:
    return DeviceError(
        "there is no such device", where=f"device {name}", found=found, fix='use "cpu", or "cuda" if torch supports it'
    )


def name_of(device: torch.device) -> str:
    """Name of a GPU; empty for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device; None if unknown.

    On the CPU, the memory that Linux reports as available, which includes reclaimable page cache; on CUDA, free memory
    plus the unused memory that torch's allocator has reserved.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if not _MEMORY_FILE.is_file():
        return None
    fields = dict(line.split(":", 1) for line in _MEMORY_FILE.read_text().splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def check_free_memory(needed: int, device: torch.device, *, where: str) -> None:
    """Raise DeviceError if `device` has fewer than `needed` free bytes."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise out_of_memory(needed, free, device, where=where)


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether an error means that memory ran out; on the CPU torch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def out_of_memory(needed: int, free: int | None, device: torch.device, *, where: str) -> DeviceError:
    """The error for a model that does not fit into memory."""
    left = "unknown" if free is None else f"{free:,} bytes"
    return DeviceError(
        "the model does not fit into memory",
        where=where,
        found=f"{needed:,} bytes needed, {left} free on {device}",
        fix="free memory, use a device with more memory, or use an artifact with fewer bits per weight",
    )
