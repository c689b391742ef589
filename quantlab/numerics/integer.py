"""Quantized matrices: small numbers times one scale per row, per group of columns or per block, and integer grids.

Symbols: W [N, K] weights (rows are outputs), g group size (K for "per row"), b bits, scale [N, K/g], integers q in
[-2^(b-1), 2^(b-1) - 1], zero points z [N, K/g] in the same range (none in symmetric formats), and ``W ≈ (q - z) * scale``. The
scale is rounded to the dtype it is stored in *before* the weights are divided by it: the stored numbers are then the ones the
weights were rounded against. Algorithms work on ``p = q - z``, the steps from the zero point, which is q where there is none.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.numerics.fp8 import dequantize_blocks


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix of small numbers with scales.

    Attributes:
        q: [N, K] int8, the integers; or float8_e4m3fn.
        scale: [N, G] in its stored dtype; G divides K, and column k has scale ``k // (K / G)``. With blocks [ceil(N/r), ceil(K/c)].
        bits: width of the numbers.
        zero: [N, G] int8 zero points, in the range of q; None where zero is the middle of the grid.
        block: rows r and columns c that share a scale; None where each scale belongs to one row.
    """

    q: Tensor
    scale: Tensor
    bits: int
    zero: Tensor | None = None
    block: tuple[int, int] | None = None

    def to(self, device: torch.device | str) -> "QuantizedMatrix":
        """The same on another device."""
        zero = None if self.zero is None else self.zero.to(device)
        return QuantizedMatrix(self.q.to(device), self.scale.to(device), self.bits, zero, self.block)

    def rows(self, some: slice) -> "QuantizedMatrix":
        """Some rows of a matrix whose scales belong to rows."""
        assert self.block is None, "blocks span rows"
        zero = None if self.zero is None else self.zero[some]
        return QuantizedMatrix(self.q[some], self.scale[some], self.bits, zero)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix that is meant, [N, K] of `dtype`.

        ``(q - z) * scale`` is formed in the dtype of the scale (as transformers and vLLM do), then cast; blocks of
        floating-point numbers are multiplied in float32.
        """
        if self.block is not None:
            return dequantize_blocks(self.q, self.scale, block=self.block, dtype=dtype)
        rows, columns = self.q.shape
        grouped = self.q.view(rows, self.scale.shape[1], -1).to(self.scale.dtype)
        if self.zero is not None:
            grouped = grouped - self.zero.to(self.scale.dtype)[:, :, None]
        return (grouped * self.scale[:, :, None]).view(rows, columns).to(dtype)


def concatenated(parts: list[QuantizedMatrix]) -> QuantizedMatrix:
    """Matrices of one format, scales belonging to rows, one below the other."""
    first = parts[0]
    if len(parts) == 1:
        return first
    zeros = [part.zero for part in parts if part.zero is not None]
    q, scale = torch.cat([part.q for part in parts]), torch.cat([part.scale for part in parts])
    return QuantizedMatrix(q, scale, first.bits, torch.cat(zeros) if zeros else None)


def integer_range(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of a signed grid of `bits` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def usable_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to their stored `dtype`; where the result is zero (an all-zero group), 1, so that q is 0 there."""
    rounded = scale.to(dtype)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def quantize_to_grid(grouped: Tensor, scale: Tensor, *, bits: int, zero: Tensor | None = None) -> Tensor:
    """Round to nearest (ties to even) on a given grid.

    Args:
        grouped: [N, G, g] float32.
        scale: [N, G] in its stored dtype.
        bits: width of the integers.
        zero: [N, G] int8 zero points; None for none.

    Returns:
        [N, G, g] float32 holding the steps ``q - z`` from the zero point.
    """
    steps = (grouped / scale.to(torch.float32)[:, :, None]).round_()
    low, high = integer_range(bits)
    if zero is None:
        return steps.clamp_(low, high)
    z = zero.to(torch.float32)[:, :, None]
    return steps.clamp_(low - z, high - z)
