"""LLM.int8(): rows of weights as int8 with the largest magnitude of the row.

The stored magnitude is 127 steps, not one step: ``W ≈ q * absmax / 127``.

Source: LLM.int8() (arXiv 2208.07339), section 2, "row-wise" quantization of weights. The rounding is that of bitsandbytes:
weights are first rounded to float16, and products with the reciprocal are rounded to nearest (ties to even) in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RowwiseInt8(NamedTuple):
    """A matrix in the form of LLM.int8().

    Attributes:
        q: [N, K] int8.
        absmax: [N] float32, the largest magnitude of each row.
    """

    q: Tensor
    absmax: Tensor


def to_rowwise_int8(W: Tensor) -> RowwiseInt8:
    """Round a matrix row by row.

    Args:
        W: [N, K] of any floating dtype, within the range of float16.
    """
    half = W.to(torch.float16)
    absmax = half.abs().amax(dim=1).to(torch.float32)
    steps = half.to(torch.float32) * (127.0 / absmax)[:, None]
    return RowwiseInt8(torch.where(absmax[:, None] > 0, steps, 0.0).round_().to(torch.int8), absmax)
