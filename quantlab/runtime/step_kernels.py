"""The kernels of a step of one new token per sequence, attention and router, on any device, with the types of their arguments.

Legend: B sequences, H hidden width, S tokens a cache has room for, h heads, G of keys, D their width, L latent width, N, V and R
widths of a head's keys without the rotary part, of its values, and of that part, K columns, E experts, k of which each token meets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from quantlab.architectures.layer import RotaryLayout, Routing

Router = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x [B, H] -> the experts [B, k] int64 and their weights [B, k] float32."""


@dataclass(frozen=True)
class Place:
    """Position in the cache of one new token of each of B sequences.

    Attributes:
        cos, sin: [B, n] float32, contiguous, of the angles of the n rotated pairs; on the CPU a table of all positions, [S, n].
        position: [1] int64, index in the cache.
        padding: [B, 1] int64, how many positions at the start of the cache are empty.
        arrived: int32 zeros, a counter for every sequence and head, for the CUDA kernels.
    """

    cos: Tensor
    sin: Tensor
    position: Tensor
    padding: Tensor
    arrived: Tensor


@dataclass(frozen=True)
class Latents:
    """A cache of latent attention: latents [B, 1, S, L], rotary keys [B, 1, S, R], and where rotated numbers lie."""

    latents: Tensor
    rotary: Tensor
    pairs: RotaryLayout


@dataclass(frozen=True)
class RowNorm:
    """An RMS norm of rows: weight [K], and epsilon."""

    weight: Tensor
    epsilon: float


class Kernels(Protocol):
    """The kernels of a device: `quantlab.runtime.cuda.launch_step`, `quantlab.runtime.native.step`."""

    def norm_heads(self, x: Tensor, norm: RowNorm) -> Tensor:
        """RMS norm of every head of x [B, h * D], whose rows may have any stride, with a weight [D]: [B, h * D]."""
        ...

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, place: Place, keys: Tensor, values: Tensor, scaling: float
    ) -> Tensor:
        """Rotate queries and keys of one token per sequence, write its keys and values to the cache, and attend to the cache.

        Args:
            q: [B, h * D]; rows may have any stride, as those of k and v.
            k, v: [B, G * D].
            place: of the tokens.
            keys, values: the cache, [B, G, S, D].
            scaling: factor of the scores.

        Returns:
            [B, h * D].
        """
        ...

    def keep_latents(
        self,
        kv: Tensor,
        norm: RowNorm,
        place: Place,
        cache: Latents,
        q_a: Tensor | None = None,
        q_norm: RowNorm | None = None,
    ) -> Tensor | None:
        """Write the normed latents and the rotated rotary keys of kv [B, L + R] to the cache.

        Returns:
            The normed q_a [B, Q], None without one.
        """
        ...

    def attend_absorbed(self, q: Tensor, weight: Tensor, place: Place, cache: Latents, scaling: float) -> Tensor:
        """Attention of all heads of one token per sequence to the latents; those of the token are in the cache already.

        Args:
            q: [B, h, N + R] contiguous, not rotated; its memory may be overwritten.
            weight: of kv_b, [h, N + V, L].
            place: of the tokens.
            cache: with the tokens' own latents.
            scaling: factor of the scores.

        Returns:
            [B, h * V].
        """
        ...

    def router(self, weight: Tensor, bias: Tensor | None, routing: Routing) -> Router:
        """The router with a weight [E, H] and a bias [E].

        Scores are the sigmoid of the logits where there is a bias, groups then judged by their two best experts; the softmax
        without a bias, groups judged by their best expert.
        """
        ...

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y [B, H]; x may be changed."""
        ...
