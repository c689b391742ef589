"""Exact int8 matrix products on every CPU.

torch's int8 operator is oneDNN's. On processors with VNNI instructions it accumulates int8 products in 32 bits. Without
VNNI it adds two neighbouring products in 16 bits with saturation. 2 · 127 · 127 still fits, but oneDNN shifts one
operand to unsigned numbers, and 2 · 255 · 127 does not fit: the result is silently wrong. Therefore the operator is
tested once per process on operands of extreme values. If it fails, products are computed in float32 over chunks of
columns that are short enough for every partial sum to be exact in float32.

Older processors, with AVX2 alone, have no fast operator either: torch's is a scalar loop there. Up to some rows the
native kernel computes their products, and beyond them chunks in float32 do.
"""

from functools import cache
from typing import Final

import torch
from torch import Tensor

from quantlab.runtime.native import kernels
from quantlab.runtime.native.library import library, product_library
from quantlab.runtime.processor import multiplies_int8

_CHUNK: Final = 1024
"""Columns per chunk: 1024 · 128 · 128 = 2^24, and float32 represents all integers up to 2^24 exactly."""
_BAND_ELEMENTS: Final = 1 << 19
"""Weights converted to float32 at once: 2 MB."""
_ROWS_AVX2: Final = 512
"""Number of rows up to which the native kernel for AVX2 is faster than chunks in float32 (Zen 3, 4096x4096)."""


def integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight^T`` in exact integer arithmetic.

    Args:
        x: [T, K] int8.
        weight: [N, K] int8, with K at most 2^17.

    Returns:
        [T, N] int32.
    """
    if multiplies_int8() and operator_is_exact():
        return torch._int_mm(x, weight.t())
    if x.shape[0] <= _ROWS_AVX2 and library() is None and product_library() is not None:
        return kernels.int8_sums(x, weight)
    return chunked_product(x, weight)


def chunked_product(x: Tensor, weight: Tensor) -> Tensor:
    """Same result as `integer_product`, from float32 products of chunks of columns: exact in any summation order."""
    (tokens, columns), rows = x.shape, weight.shape[0]
    total = torch.zeros(tokens, rows, dtype=torch.int32)
    band = max(_BAND_ELEMENTS // _CHUNK, 1)
    for start in range(0, columns, _CHUNK):
        chunk = x[:, start : start + _CHUNK].to(torch.float32)
        for first in range(0, rows, band):
            part = weight[first : first + band, start : start + _CHUNK].to(torch.float32)
            total[:, first : first + band] += (chunk @ part.t()).to(torch.int32)
    return total


@cache
def operator_is_exact() -> bool:
    """Whether torch's int8 operator is exact on this processor, tested on extreme operands of several shapes."""
    return all(
        torch.equal(torch._int_mm(x, weight.t()), _obvious_product(x, weight))
        for tokens, rows, columns in ((1, 64, 64), (17, 64, 100), (64, 16, 256))
        for x, weight in _extremes(tokens, rows, columns)
    )


def _extremes(tokens: int, rows: int, columns: int) -> list[tuple[Tensor, Tensor]]:
    """Operands whose sums of neighbouring products reach the largest and smallest values that int8 allows."""
    values = ((127, 127), (127, -128), (-128, 127), (-128, -128))
    alternating = torch.where(torch.arange(columns) % 2 == 0, 127, -128).to(torch.int8)
    constant = [
        (torch.full((tokens, columns), a, dtype=torch.int8), torch.full((rows, columns), b, dtype=torch.int8))
        for a, b in values
    ]
    return [*constant, (alternating.repeat(tokens, 1), alternating.repeat(rows, 1))]


def _obvious_product(x: Tensor, weight: Tensor) -> Tensor:
    return (x.to(torch.int64) @ weight.to(torch.int64).t()).to(torch.int32)
