"""Build and load the native kernels: by the system's C compiler at first use, cached in the user's cache directory.

There are two sets. The complete one needs AVX-512 with VNNI and BF16. Other processors with AVX2, FMA and F16C get the
products of quantized matrices alone; ``QUANTLAB_NATIVE=avx2`` in the environment chooses this set on every processor.

The kernels are optional. Without a compiler, on a processor without the instructions, or with ``QUANTLAB_NATIVE=0``,
both `library()` and `product_library()` are None and the banks fall back to torch's operators. `status()` says what is
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
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch  # noqa: F401 - loads the OpenMP runtime that the kernels call

from quantlab.files import cache_directory
from quantlab.runtime.processor import flags

SWITCH: Final = "QUANTLAB_NATIVE"


@dataclass(frozen=True)
class _Set:
    """Kernels that are compiled into one library.

    Attributes:
        instructions: flags in /proc/cpuinfo.
        options: of the compiler, which select the instructions.
        sources: that are compiled.
    """

    instructions: frozenset[str]
    options: tuple[str, ...]
    sources: tuple[str, ...]


_COMPLETE: Final = _Set(
    frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16", "fma", "f16c"}),
    ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16", "-mfma", "-mf16c"),
    ("attention.c", "dense.c", "expand.c", "int4.c", "int8.c", "pairs.c", "router.c", "rowwise.c"),
)
_PRODUCTS: Final = _Set(
    frozenset({"avx2", "fma", "f16c"}), ("-mavx2", "-mfma", "-mf16c"), ("expand.c", "products256.c")
)
INSTRUCTIONS: Final = _COMPLETE.instructions | _PRODUCTS.instructions
"""The flags in /proc/cpuinfo that choose a set of kernels."""
_HEADERS: Final = ("kernels.h", "simd.h", "simd256.h", "work.h")
_FLAGS: Final = ("-O2", "-std=gnu11", "-fPIC")
_SECONDS: Final = 120
"""Timeout of the compiler."""


def library() -> ctypes.CDLL | None:
    """The library of all kernels; None where it is not available (see `status`)."""
    return _loaded().library if _loaded().complete else None


def product_library() -> ctypes.CDLL | None:
    """The library with the products of quantized matrices: that of all kernels, or of these products alone."""
    return _loaded().library


def status() -> str:
    """Whether native or torch's kernels are used; for the latter, with the reason."""
    return _loaded().status


@dataclass(frozen=True)
class _Loaded:
    library: ctypes.CDLL | None
    complete: bool
    status: str


@cache
def _loaded() -> _Loaded:
    asked, present = os.environ.get(SWITCH), flags()
    if asked == "0":
        return _Loaded(None, False, f"torch's kernels ({SWITCH}=0)")
    missing = sorted(_COMPLETE.instructions - present)
    complete = not missing and asked != "avx2"
    if not complete and not present >= _PRODUCTS.instructions:
        return _Loaded(None, False, f"torch's kernels (this processor has no {missing[0]})")
    reason = f"this processor has no {missing[0]}" if missing else f"{SWITCH}=avx2"
    used = "native kernels" if complete else f"native products of quantized matrices with AVX2 ({reason})"
    compiler = find_compiler()
    if compiler is None:
        return _Loaded(None, False, "torch's kernels (no C compiler found: install gcc or set CC)")
    try:
        loaded = ctypes.CDLL(str(_built(compiler, _COMPLETE if complete else _PRODUCTS)))
    except subprocess.CalledProcessError as error:
        lines = str(error.stderr).strip().splitlines() or [f"exit status {error.returncode}"]
        return _Loaded(None, False, f"torch's kernels ({compiler} failed: {lines[0]})")
    except (OSError, subprocess.TimeoutExpired) as error:
        return _Loaded(None, False, f"torch's kernels ({error})")
    return _Loaded(loaded, complete, used)


def find_compiler() -> str | None:
    """The path of the C compiler that builds the kernels: `CC`, else the first of cc, gcc and clang; None without one."""
    chosen = os.environ.get("CC")
    names = (chosen,) if chosen else ("cc", "gcc", "clang")
    return next((path for name in names if (path := shutil.which(name))), None)


def _built(compiler: str, kernels: _Set) -> Path:
    """The path of the shared library of a set, which is compiled if it is not in the cache."""
    sources = Path(__file__).parent
    identity = Path(compiler).resolve().stat()
    digest = hashlib.sha256(repr((compiler, identity.st_size, identity.st_mtime_ns, _FLAGS, kernels.options)).encode())
    for name in (*kernels.sources, *_HEADERS):
        digest.update((sources / name).read_bytes())
    directory = cache_directory()
    target = directory / f"kernels-{digest.hexdigest()[:16]}.so"
    if target.is_file():
        return target
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix="building-") as building:
        made = Path(building) / target.name
        objects = [made.with_name(f"{name}.o") for name in kernels.sources]
        with ThreadPoolExecutor() as pool:  # one compiler process uses one core
            commands = [
                [compiler, *_FLAGS, *kernels.options, "-c", str(sources / to.stem), "-o", str(to)] for to in objects
            ]
            list(pool.map(_run, commands))
        _run([compiler, "-shared", *map(str, objects), "-o", str(made)])
        made.replace(target)
    return target


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
