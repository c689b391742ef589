"""Where a model computes: the device that was named, whether it is one the runtime can use, and what memory it has left."""

from pathlib import Path
from typing import Final

import torch

from quantlab.errors import DeviceError

_LEAST_CAPABILITY: Final = (8, 0)
"""bfloat16 in tensor cores, which every kernel multiplies in."""
_MEMORY_FILE: Final = Path("/proc/meminfo")


def find_device(name: str | torch.device) -> torch.device:
    """The device of a name: "cpu", "cuda" or "cuda:1"; "cuda" is the current one, "auto" is "cuda" where there is a usable one, else "cpu".

    Raises:
        DeviceError: there is no such device here, or it is not one the runtime computes on.
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
            "the GPU is too old for the runtime",
            where=f"device {name}, {torch.cuda.get_device_name(index)}",
            found=f"compute capability {capability[0]}.{capability[1]}",
            fix="use compute capability {}.{} or newer (A100 and later), or the CPU".format(*_LEAST_CAPABILITY),
        )
    return torch.device("cuda", index)


def _no_device(name: str | torch.device, found: str) -> DeviceError:
    return DeviceError(
        "there is no such device", where=f"device {name}", found=found, fix='use "cpu", or "cuda" where torch has it'
    )


def name_of(device: torch.device) -> str:
    """A GPU's name, empty for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device, None where nobody says.

    On the CPU what Linux calls available, which counts the page cache it would give up; on CUDA also what torch's allocator
    holds without using it.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if not _MEMORY_FILE.is_file():
        return None
    fields = dict(line.split(":", 1) for line in _MEMORY_FILE.read_text().splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def check_room(needed: int, device: torch.device, *, where: str) -> None:
    """Raise DeviceError if `device` has fewer than `needed` bytes left."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise out_of_memory(needed, free, device, where=where)


def ran_out(error: RuntimeError | MemoryError) -> bool:
    """Whether an error says that memory ran out; torch has no class of its own for this on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def out_of_memory(needed: int, free: int | None, device: torch.device, *, where: str) -> DeviceError:
    """The error of a model that does not fit."""
    left = "unknown" if free is None else f"{free:,} bytes"
    return DeviceError(
        "the model does not fit into memory",
        where=where,
        found=f"{needed:,} bytes needed, {left} free on {device}",
        fix="free memory there, use a device with more of it, or an artifact of fewer bits",
    )
