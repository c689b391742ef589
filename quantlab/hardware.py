"""Names of the machine and versions of the libraries, for records and manifests. Does not import torch."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from quantlab.version import VERSION

_PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "safetensors", "compressed-tensors", "numpy"
)  # fmt: skip
INSTRUCTION_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "QUANTLAB_NATIVE", "CC")
"""Environment variables that select instruction sets and kernels."""


def environment() -> dict[str, str]:
    """The variables among `INSTRUCTION_VARIABLES` that are set."""
    return {name: os.environ[name] for name in INSTRUCTION_VARIABLES if name in os.environ}


def threads() -> int:
    """Number of compute threads: the physical cores available to the process. A second thread per core does not help."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = {(block.get("physical id"), block.get("core id", block.get("processor"))) for block in _processors()}
    return min(allowed, len(cores) or allowed)


def describe(gpu: str = "") -> str:
    """GPU if one is used, processor, number of threads, memory and operating system, in one line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    used = threads()
    return (
        f"{gpu}; " * bool(gpu)
        + f"{processor()}, {used} thread{'s' if used != 1 else ''}, {memory:.0f} GiB, {platform.system()} {platform.machine()}"
    )


def processor() -> str:
    """The name of the processor."""
    names = [block["model name"] for block in _processors() if "model name" in block]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python, quantlab and numerical libraries; packages that are not installed (triton) are omitted."""
    found = {"python": platform.python_version(), "quantlab": VERSION}
    for package in _PACKAGES:
        found |= version_of(package)
    return found


def version_of(package: str) -> dict[str, str]:
    """The version of a package by its name; empty if it is not installed."""
    try:
        return {package: version(package)}
    except PackageNotFoundError:
        return {}


def _processors() -> list[dict[str, str]]:
    """The entries of /proc/cpuinfo, empty if the file does not exist."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return []
    blocks = []
    for block in path.read_text().strip().split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines())
        blocks.append({key.strip(): value.strip() for key, _, value in pairs})
    return blocks
