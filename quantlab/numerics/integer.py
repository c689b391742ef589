"""Quantized matrices: integers or FP8 values times one scale per row, per group of columns or per block; integer grids.

Symbols: W [N, K] weights (rows are outputs), g group size (K for "per row"), b bits, scale [N, K/g], integers q in
[-2^(b-1), 2^(b-1) - 1], zero points z [N, K/g] in the same range (none in symmetric formats), and
``W ≈ (q - z) * scale``. The scale is rounded to its stored dtype *before* the weights are divided by it, so the weights
are rounded on the stored grid. Algorithms work on ``p = q - z``, the steps from the zero point; p = q without zero
points.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.numerics.fp8 import dequantize_blocks


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantized matrix.

    Attributes:
        q: [N, K] int8 integers, or float8_e4m3fn values.
        scale: [N, G] in its stored dtype; G divides K, and column k has scale ``k // (K / G)``. With blocks it is
            [ceil(N/r), ceil(K/c)].
        bits: width of a stored value.
        zero: [N, G] int8 zero points, in the range of q; None for symmetric formats.
        block: rows r and columns c that share a scale; None if each scale belongs to one row.
    """

    q: Tensor
    scale: Tensor
    bits: int
    zero: Tensor | None = None
    block: tuple[int, int] | None = None

    def to(self, device: torch.device | str) -> "QuantizedMatrix":
        """The matrix on another device."""
        zero = None if self.zero is None else self.zero.to(device)
        return QuantizedMatrix(self.q.to(device), self.scale.to(device), self.bits, zero, self.block)

    def rows(self, some: slice) -> "QuantizedMatrix":
        """A slice of rows; the scales must belong to rows, not blocks."""
        assert self.block is None, "blocks span rows"
        zero = None if self.zero is None else self.zero[some]
        return QuantizedMatrix(self.q[some], self.scale[some], self.bits, zero)

    def expands_within_range(self) -> bool:
        """Whether every value ``(q - z) * scale`` is finite in the dtype of the scale, in which engines form it."""
        if self.block is not None or self.scale.dtype != torch.float16 or not self.q.numel():
            return True  # other dtypes have the range of float32
        low, high = self.q.view(*self.scale.shape, -1).aminmax(dim=2)
        zero = torch.zeros_like(low) if self.zero is None else self.zero
        furthest = torch.maximum((high.int() - zero.int()).abs(), (low.int() - zero.int()).abs())
        return bool((furthest.float() * self.scale.float().abs()).max() <= torch.finfo(torch.float16).max)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dequantized matrix [N, K] of `dtype`.

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
    """Concatenate matrices of one format by rows; their scales must belong to rows."""
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
    """Round scales to their stored `dtype`; a zero scale (of an all-zero group) becomes 1, so that q is 0 there."""
    rounded = scale.to(dtype)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def quantize_to_grid(
    grouped: Tensor, scale: Tensor, *, bits: int, zero: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Round to nearest (ties to even) on a given grid.

    Args:
        grouped: [N, G, g] float32.
        scale: [N, G] in its stored dtype.
        bits: width of the integers.
        zero: [N, G] int8 zero points, or None.
        out: [N, G, g] float32 to write the result to; None for a new tensor.

    Returns:
        [N, G, g] float32 holding the steps ``q - z`` from the zero point.
    """
    steps = torch.div(grouped, scale.to(torch.float32)[:, :, None], out=out).round_()
    low, high = integer_range(bits)
    if zero is None:
        return steps.clamp_(low, high)
    z = zero.to(torch.float32)[:, :, None]
    return steps.clamp_(low - z, high - z)
