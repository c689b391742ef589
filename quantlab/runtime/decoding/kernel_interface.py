"""Interface of the kernels that a fused decode step calls on a device, with the types of their arguments.

A step decodes one new token per sequence.

Legend: B sequences, H hidden width, S capacity of the cache in tokens, h query heads, G key-value heads, D head width,
L latent width, N width of a head's keys without the rotary part, V width of a head's values, R width of the rotary
part, K columns, E experts, k experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from quantlab.architectures.layer import RotaryLayout, Routing

Router = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x [B, H] -> indices of the chosen experts [B, k] int64 and their weights [B, k] float32."""


@dataclass(frozen=True)
class CachePosition:
    """Position in the cache of the new token of each of B sequences.

    Attributes:
        cos, sin: [B, n] float32, contiguous: cosine and sine of the angles of the n rotated pairs; on the CPU a table
            of all positions, [S, n].
        index: [1] int64, position in the cache.
        padding: [B, 1] int64, number of empty positions at the start of the cache.
        arrived: int32 zeros, one counter per sequence and head, used by the CUDA kernels.
    """

    cos: Tensor
    sin: Tensor
    index: Tensor
    padding: Tensor
    arrived: Tensor


@dataclass(frozen=True)
class Latents:
    """Cache of a layer of latent attention: latents [B, 1, S, L], rotary keys [B, 1, S, R], order of rotary pairs."""

    latents: Tensor
    rotary: Tensor
    pairs: RotaryLayout


@dataclass(frozen=True)
class RowNorm:
    """Parameters of an RMS norm over rows: weight [K] and epsilon."""

    weight: Tensor
    epsilon: float


class Kernels(Protocol):
    """Kernels of one device, implemented by `quantlab.runtime.cuda.launch_step` and `quantlab.runtime.native.step`."""

    def norm_heads(self, x: Tensor, norm: RowNorm) -> Tensor:
        """RMS norm of each head of x [B, h * D] with a weight [D] -> [B, h * D]; rows of x may have any stride."""
        ...

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache_position: CachePosition,
        keys: Tensor,
        values: Tensor,
        scaling: float,
    ) -> Tensor:
        """Rotate the queries and keys of the new tokens, write keys and values to the cache, and attend to the cache.

        Args:
            q: [B, h * D]; rows of q, k and v may have any stride.
            k, v: [B, G * D].
            cache_position: position of the new tokens.
            keys, values: the cache, [B, G, S, D].
            scaling: factor of the attention scores.

        Returns:
            [B, h * D].
        """
        ...

    def write_latents(
        self,
        kv: Tensor,
        norm: RowNorm,
        cache_position: CachePosition,
        cache: Latents,
        q_a: Tensor | None = None,
        q_norm: RowNorm | None = None,
    ) -> Tensor | None:
        """Normalize the latents and rotate the rotary keys of kv [B, L + R], and write both to the cache.

        Returns:
            The normalized query latent q_a [B, Q]; None if q_a is None.
        """
        ...

    def attend_absorbed(
        self, q: Tensor, weight: Tensor, cache_position: CachePosition, cache: Latents, scaling: float
    ) -> Tensor:
        """Attention of all heads of the new tokens to the cached latents.

        Args:
            q: [B, h, N + R] contiguous, not yet rotated; its memory may be overwritten.
            weight: weight of kv_b, [h, N + V, L].
            cache_position: position of the new tokens.
            cache: already contains the latents of the new tokens.
            scaling: factor of the attention scores.

        Returns:
            [B, h * V].
        """
        ...

    def router(self, weight: Tensor, bias: Tensor | None, routing: Routing) -> Router:
        """A router with weight [E, H] and bias [E].

        With a bias, scores are the sigmoid of the logits and a group of experts is ranked by the sum of its two best
        scores. Without a bias, scores are the softmax of the logits and a group is ranked by its best score.
        """
        ...

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y, [B, H]; x may be overwritten."""
        ...
