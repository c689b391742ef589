"""Exact int8 matrix products on every CPU.

torch's int8 operator is oneDNN's. On processors with VNNI instructions it accumulates int8 products in 32 bits. Without
VNNI it adds two neighbouring products in 16 bits with saturation. 2 · 127 · 127 still fits, but oneDNN shifts one
operand to unsigned numbers, and 2 · 255 · 127 does not fit: the result is silently wrong. Therefore the operator is
tested once per process on operands of extreme values. If it fails, products are computed in float32 over chunks of
columns that are short enough for every partial sum to be exact in float32.
"""

from functools import cache
from typing import Final

import torch
from torch import Tensor

_CHUNK: Final = 1024
"""Columns per chunk: 1024 · 128 · 128 = 2^24, and float32 represents all integers up to 2^24 exactly."""
_BAND_ELEMENTS: Final = 1 << 19
"""Weights converted to float32 at once: 2 MB."""


def integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight^T`` in exact integer arithmetic.

    Args:
        x: [T, K] int8.
        weight: [N, K] int8, with K at most 2^17.

    Returns:
        [T, N] int32.
    """
    if operator_is_exact():
        return torch._int_mm(x, weight.t())
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
