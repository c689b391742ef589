"""Symmetric integer grids: a matrix as small integers times one scale per row or per group of columns.

Symbols: W [N, K] weights (rows are outputs), g group size (K for "per row"), b bits, scale [N, K/g], q in
[-2^(b-1), 2^(b-1) - 1], and the matrix that is meant is ``q * scale``. The scale is rounded to the dtype it is stored in
*before* the weights are divided by it: the stored numbers are then the ones the weights were rounded against.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix on an integer grid.

    Attributes:
        q: [N, K] int8, the integers.
        scale: [N, G] in its stored dtype; G divides K, and column k has scale ``k // (K / G)``.
        bits: width of the integers.
    """

    q: Tensor
    scale: Tensor
    bits: int

    def to(self, device: torch.device | str) -> "QuantizedMatrix":
        """The same on another device."""
        return QuantizedMatrix(self.q.to(device), self.scale.to(device), self.bits)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """``q * scale`` [N, K]: formed in the dtype of the scale (as transformers and vLLM do), then cast to `dtype`."""
        rows, columns = self.q.shape
        grouped = self.q.view(rows, self.scale.shape[1], -1).to(self.scale.dtype)
        return (grouped * self.scale[:, :, None]).view(rows, columns).to(dtype)


def integer_range(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of a signed grid of `bits` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def usable_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to their stored `dtype`; where the result is zero (an all-zero group), 1, so that q is 0 there."""
    rounded = scale.to(dtype)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def quantize_to_grid(grouped: Tensor, scale: Tensor, *, bits: int) -> Tensor:
    """Round to nearest (ties to even) on a given grid.

    Args:
        grouped: [N, G, g] float32.
        scale: [N, G] in its stored dtype.
        bits: width of the integers.

    Returns:
        [N, G, g] float32 holding integers.
    """
    low, high = integer_range(bits)
    return (grouped / scale.to(torch.float32)[:, :, None]).round_().clamp_(low, high)
