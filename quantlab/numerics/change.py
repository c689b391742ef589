"""What a change did to a weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.numerics.bands import bands
from quantlab.numerics.integer import QuantizedMatrix


@dataclass(frozen=True)
class Change:
    """A weight before its change, and its change.

    Attributes:
        before: [N, K] float32.
        delta: [N, K] float32, the changed weight minus `before`.
        nonzero: number of elements that are not zero after the change.
    """

    before: Tensor
    delta: Tensor
    nonzero: int


def change_of(W: Tensor, result: Tensor | QuantizedMatrix) -> Change:
    """Compare a weight with what became of it; a quantized result is dequantized a band of rows at a time.

    Args:
        W: [N, K] of any floating dtype.
        result: the same shape, on the same device.
    """
    before = W.to(torch.float32)
    delta = torch.empty_like(before)
    nonzero = torch.zeros((), dtype=torch.int64, device=W.device)
    whole = isinstance(result, QuantizedMatrix) and result.block is not None  # its scales span rows
    for band in (slice(None),) if whole else bands(W):
        after = _expanded(result, band)
        nonzero += after.count_nonzero()
        torch.sub(after, before[band], out=delta[band])
    return Change(before, delta, int(nonzero))


def _expanded(result: Tensor | QuantizedMatrix, band: slice) -> Tensor:
    """The rows of a band in float32."""
    if isinstance(result, Tensor):
        return result[band].to(torch.float32)
    return (result if band == slice(None) else result.rows(band)).dequantize(torch.float32)
