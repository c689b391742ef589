"""What the attention and the router of a step are told, on any device.

Legend: B sequences, S tokens a cache has room for, L latent width, R width of the rotary part, K columns.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where new tokens stand, one of each of B sequences.

    Attributes:
        cos, sin: [B, n] float32, contiguous, of the angles of the n pairs that are turned; on the CPU a table of them for every
            place, [S, n].
        position: [1] int64, the place in the cache.
        padding: [B, 1] int64, how many places of the cache are empty at its start.
        arrived: int32 zeros, a counter for every sequence and head, for the kernels of CUDA.
    """

    cos: Tensor
    sin: Tensor
    position: Tensor
    padding: Tensor
    arrived: Tensor


@dataclass(frozen=True)
class Pairs:
    """Whether the numbers that are turned together are neighbours, or half the width apart, as projected and as cached."""

    projected: bool
    cached: bool


@dataclass(frozen=True)
class Latents:
    """A cache of latent attention: latents [B, 1, S, L], rotary keys [B, 1, S, R], and where the numbers of pairs lie."""

    latents: Tensor
    rotary: Tensor
    pairs: Pairs


@dataclass(frozen=True)
class RowNorm:
    """An RMS norm of rows: weight [K], and epsilon."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class Choice:
    """How a router chooses among E experts; see `quantlab.runtime.cuda.choose.choose`."""

    groups: int
    top_groups: int
    top_k: int
    sigmoid: bool
    normed: bool
    scaling: float
