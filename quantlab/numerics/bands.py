"""Bands: the rows of a matrix, a few at a time, so that what is computed from them fits into the processor's cache.

A temporary of a whole weight costs more than the arithmetic on it: the system hands out its pages one by one, zeroed.
"""

from collections.abc import Iterator
from typing import Final

from torch import Tensor

_WEIGHTS: Final = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Elements per band."""


def bands(matrix: Tensor) -> Iterator[slice]:
    """Slices that cover the rows of a matrix [N, K] in order; each has one row at least."""
    rows, columns = matrix.shape
    height = max(1, _WEIGHTS.get(matrix.device.type, _WEIGHTS["cpu"]) // max(columns, 1))
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))
