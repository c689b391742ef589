"""NF4 (4-bit NormalFloat): blocks of weights as indices of 16 quantiles of the normal distribution, two per byte.

A block of weights is divided by its largest magnitude; every quotient is replaced by the nearest of 16 fixed levels in
[-1, 1]. With double quantization the magnitudes of 256 blocks are themselves rounded, after their mean is subtracted, to
255 levels that are denser near zero.

Symbols: W [N, K] weights, read row by row as one sequence; g weights of a block; B = ceil(N K / g) blocks; absmax [B]
float32; B2 = ceil(B / 256).

Source: QLoRA (arXiv 2305.14314), section 3 and appendix E, whose levels these are; the levels of double quantization are
those of arXiv 2110.02861, section 2. The rounding is that of bitsandbytes' portable kernels, down to the last bit: quotients
are products with a reciprocal in float32, and a quotient halfway between two levels takes the lower one. (Its library for
CPUs finds the levels of double quantization in a table of 65,536 steps, so that one block in a few hundred gets a
neighbour of the nearest level.)
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

LEVELS: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The levels of NF4 in float32, ascending."""
NESTED_BLOCK: Final = 256
"""Magnitudes that share one magnitude in double quantization."""
_SMALLEST: Final = 1e-38
"""Replaces smaller magnitudes of blocks before they are inverted."""


@dataclass(frozen=True)
class NormalFloats:
    """A matrix in NF4.

    Attributes:
        packed: [ceil(N K / 2), 1] uint8: indices of `LEVELS`, the first of two in the high bits.
        absmax: [B] float32 largest magnitude of each block.
    """

    packed: Tensor
    absmax: Tensor


@dataclass(frozen=True)
class NestedMagnitudes:
    """Magnitudes of blocks after double quantization.

    Attributes:
        indices: [B] uint8 indices of `nested_levels`.
        absmax: [B2] float32 largest distance from the mean of each 256 magnitudes.
        mean: mean of all magnitudes, a float32 number.
    """

    indices: Tensor
    absmax: Tensor
    mean: float


def to_normal_floats(W: Tensor, *, block: int) -> NormalFloats:
    """Round a matrix to NF4.

    Args:
        W: [N, K] of any floating dtype.
        block: weights g that share a magnitude.
    """
    scaled, absmax = _scaled(W.reshape(-1).to(torch.float32), block)
    indices = _nearest(scaled, torch.tensor(LEVELS))
    if indices.numel() % 2:
        indices = functional.pad(indices, (0, 1), value=LEVELS.index(0.0))
    return NormalFloats((indices[::2] << 4 | indices[1::2])[:, None], absmax)


def from_normal_floats(packed: Tensor, absmax: Tensor, *, block: int, shape: tuple[int, int]) -> Tensor:
    """The matrix [N, K] float32 of `to_normal_floats`.

    Args:
        packed: see `NormalFloats`.
        absmax: [B] float32.
        block: weights g that share a magnitude.
        shape: N and K.
    """
    indices = torch.stack([packed[:, 0] >> 4, packed[:, 0] & 15], dim=1).flatten()[: shape[0] * shape[1]]
    values = torch.tensor(LEVELS)[indices.to(torch.int64)]
    return (_blocks(values, block) * absmax[:, None]).flatten()[: values.numel()].view(shape)


def nested_levels() -> Tensor:
    """[256] float32, ascending: the levels of double quantization.

    Level 0 and level 1, and for every decade 10^-6 to 1 twice as many levels as for the one below it, of both signs:
    the middles of 1, 2, 4 … 64 equal parts of [0.1, 1] times the decade.
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (bounds[:-1] + bounds[1:]) / 2.0 * 10.0 ** (exponent - 6)
        levels += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(levels), dtype=torch.float32)


def nest(absmax: Tensor) -> NestedMagnitudes:
    """Round the magnitudes of blocks: double quantization.

    The mean is formed in float64 and rounded, so that it does not depend on the number of threads; bitsandbytes forms it
    in float32.

    Args:
        absmax: [B] float32.
    """
    mean = absmax.to(torch.float64).mean().to(torch.float32)
    scaled, furthest = _scaled(absmax - mean, NESTED_BLOCK)
    return NestedMagnitudes(_nearest(scaled, nested_levels()), furthest, mean.item())


def unnest(nested: NestedMagnitudes) -> Tensor:
    """The magnitudes [B] float32 of `nest`."""
    values = _blocks(nested_levels()[nested.indices.to(torch.int64)], NESTED_BLOCK)
    return (values * nested.absmax[:, None]).flatten()[: nested.indices.numel()] + nested.mean


def _blocks(values: Tensor, size: int) -> Tensor:
    """[ceil(n / size), size] of [n]; the last block is filled with zeros."""
    return functional.pad(values, (0, -values.numel() % size)).view(-1, size)


def _scaled(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """[n] float32 -> every value divided by the largest magnitude of its block [n], and those magnitudes [ceil(n / size)].

    Whole blocks are multiplied with a reciprocal, a shorter last one is divided, as bitsandbytes does.
    """
    whole = values.numel() - values.numel() % size
    blocks = values[:whole].view(-1, size)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=_SMALLEST))[:, None]).clamp(-1, 1).flatten()
    if whole == values.numel():
        return scaled, absmax
    last = values[whole:].abs().amax().clamp(min=_SMALLEST)
    return torch.cat([scaled, (values[whole:] / last).clamp(-1, 1)]), torch.cat([absmax, last[None]])


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Indices (uint8) of the nearest of ascending levels; the lower one halfway between two."""
    return torch.bucketize(values, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)
