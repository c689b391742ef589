"""What the processor multiplies fast, from its flags: the same at every start, never a timing."""

import platform
from functools import cache
from pathlib import Path
from typing import Final

import torch

MATRIX_UNIT_ROWS: Final = 16
"""Number of rows from which matrix units (AMX) are several times as fast as vector instructions."""


def flags() -> frozenset[str]:
    """The flags of the first processor in /proc/cpuinfo; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    found = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(found.partition(":")[2].split())


@cache
def has_matrix_units() -> bool:
    """Whether the processor multiplies tiles of bfloat16 and int8 (AMX), which oneDNN uses."""
    return torch.cpu._is_amx_tile_supported()


@cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has bfloat16 products. Without them torch's are several times slower than those of float32."""
    if _is_x86():
        return torch.cpu._is_avx512_bf16_supported() or has_matrix_units()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def multiplies_float16() -> bool:
    """Whether the processor has float16 products in matrix units. Vector instructions are no faster than float32."""
    return torch.cpu._is_amx_fp16_supported()


@cache
def multiplies_int8() -> bool:
    """Whether the processor has int8 products (VNNI, on x86). Without them torch's operator is a scalar loop."""
    return not _is_x86() or torch.cpu._is_vnni_supported() or "avx_vnni" in flags()


def _is_x86() -> bool:
    return platform.machine().lower() in {"x86_64", "amd64"}
