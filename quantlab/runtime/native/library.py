"""Build and load the native kernels: by the system's C compiler at first use, cached in the user's cache directory.

The kernels are optional. Without a compiler, on a processor without the instructions, or with ``QUANTLAB_NATIVE=0`` in
the environment, `library()` is None and the banks fall back to torch's operators. `status()` says which of the two is
used, and why.

The name of the cached file is a hash of everything it depends on: the sources, the compiler (path, size, modification
time) and the flags. The file appears by an atomic rename, so processes that build at the same time only waste a second.

Threads are torch's: the kernels call, by name, the OpenMP runtime that torch has loaded into the process. If there is
none, the library does not load and the fallback is used.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Final

import torch  # noqa: F401 - loads the OpenMP runtime that the kernels call

SWITCH: Final = "QUANTLAB_NATIVE"
_CPU: Final = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16", "fma", "f16c"})
_FLAGS: Final = (
    *("-O2", "-std=gnu11", "-fPIC"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16", "-mfma", "-mf16c"),
)
_SOURCES: Final = (
    "attention.c",
    "dense.c",
    "int4.c",
    "int8.c",
    "kernels.h",
    "pairs.c",
    "router.c",
    "rowwise.c",
    "simd.h",
)
_SECONDS: Final = 120
"""Timeout of the compiler."""


def library() -> ctypes.CDLL | None:
    """The library of kernels; None where it is not available (see `status`)."""
    return _loaded()[0]


def status() -> str:
    """Whether native or torch's kernels are used; for the latter, with the reason."""
    return _loaded()[1]


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get(SWITCH) == "0":
        return None, f"torch's kernels ({SWITCH}=0)"
    missing = sorted(_CPU - _cpu_flags())
    if missing:
        return None, f"torch's kernels (this processor has no {missing[0]})"
    compiler = _compiler()
    if compiler is None:
        return None, "torch's kernels (no C compiler found: install gcc or set CC)"
    try:
        return ctypes.CDLL(str(_built(compiler))), "native kernels"
    except subprocess.CalledProcessError as error:
        lines = str(error.stderr).strip().splitlines() or [f"exit status {error.returncode}"]
        return None, f"torch's kernels ({compiler} failed: {lines[0]})"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"torch's kernels ({error})"


def _cpu_flags() -> frozenset[str]:
    """The flags of the first processor in /proc/cpuinfo; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    found = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(found.partition(":")[2].split())


def _compiler() -> str | None:
    chosen = os.environ.get("CC")
    names = (chosen,) if chosen else ("cc", "gcc", "clang")
    return next((path for name in names if (path := shutil.which(name))), None)


def _built(compiler: str) -> Path:
    """The path of the shared library, which is compiled if it is not in the cache."""
    sources = Path(__file__).parent
    identity = Path(compiler).resolve().stat()
    digest = hashlib.sha256(repr((compiler, identity.st_size, identity.st_mtime_ns, _FLAGS)).encode())
    for name in _SOURCES:
        digest.update((sources / name).read_bytes())
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantlab"
    target = directory / f"kernels-{digest.hexdigest()[:16]}.so"
    if target.is_file():
        return target
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix="building-") as building:
        made = Path(building) / target.name
        objects = [made.with_name(f"{name}.o") for name in _SOURCES if name.endswith(".c")]
        with ThreadPoolExecutor() as pool:  # one compiler process uses one core
            commands = [[compiler, *_FLAGS, "-c", str(sources / to.stem), "-o", str(to)] for to in objects]
            list(pool.map(_run, commands))
        _run([compiler, "-shared", *map(str, objects), "-o", str(made)])
        made.replace(target)
    return target


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
