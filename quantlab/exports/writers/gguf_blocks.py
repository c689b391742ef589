"""The blocks in which GGUF stores numbers: 32 consecutive columns of one row with one scale, or plain floating point.

Legend: a matrix [N, K] has N rows and B = K / 32 blocks per row; d is the scale of a block and m its minimum, both float16;
values are d q in Q4_0 (q from -8 to 7) and Q8_0, and d u + m in Q4_1 (u from 0 to 15).
Source: `ggml/src/ggml-common.h` and `ggml-quants.c` of llama.cpp.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.errors import ArtifactError
from quantlab.exports.gguf.tensors import BLOCK, BlockType
from quantlab.numerics.integer import QuantizedMatrix

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_OFFSET = 8
"""Added to int4 values, which are stored from 0 on."""


@dataclass
class Rounded:
    """Numbers that float16 does not hold exactly.

    Attributes:
        numbers: how many were stored.
        inexact: how many of them were rounded.
        largest: largest relative error of one.
    """

    numbers: int = 0
    inexact: int = 0
    largest: float = 0.0

    def to_float16(self, values: Tensor, name: str) -> Tensor:
        """Values as float16, counted.

        Raises:
            ArtifactError: one is too large for float16.
        """
        exact = values.to(torch.float32)
        half = exact.to(torch.float16)
        if not bool(half.isfinite().all()):
            raise ArtifactError(
                "a scale is too large for GGUF, which stores float16",
                where=name,
                found=f"{float(exact.abs().max()):.4g}, float16 ends at {torch.finfo(torch.float16).max:g}",
                fix="quantize the weight without folded scales, or write another format",
            )
        error = (half.to(torch.float32) - exact).abs()
        self.numbers += error.numel()
        changed = error > 0
        if bool(changed.any()):
            self.inexact += int(changed.sum())
            self.largest = max(self.largest, float((error[changed] / exact[changed].abs()).max()))
        return half


def float_bytes(values: Tensor, kind: BlockType) -> Tensor:
    """Floating-point values [..., K] as uint8 [..., bytes of a row]; `kind` holds them exactly."""
    return values.to(_DTYPES[kind]).contiguous().view(torch.uint8)


def block_bytes(matrix: QuantizedMatrix, kind: BlockType, name: str, *, scales: Rounded, minima: Rounded) -> Tensor:
    """A quantized matrix [N, K] as uint8 [N, bytes of a row].

    Args:
        matrix: integers with scales of rows or of groups whose width is a multiple of 32.
        kind: a type for its width and symmetry.
        name: of the weight, for errors.
        scales: counts the scales.
        minima: counts the minima of Q4_1.

    Raises:
        ArtifactError: a scale is too large for float16.
    """
    rows, columns = matrix.q.shape
    blocks = columns // BLOCK
    repeat = blocks // matrix.scale.shape[1]
    parts = [_repeated(scales.to_float16(matrix.scale, name), repeat)]
    if kind == "Q4_1":
        assert matrix.zero is not None, "asymmetric"
        lowest = -(_OFFSET + matrix.zero.to(torch.float32)) * matrix.scale.to(torch.float32)
        parts.append(_repeated(minima.to_float16(lowest, name), repeat))
    q = matrix.q.view(rows, blocks, BLOCK)
    parts.append(q.view(torch.uint8) if kind == "Q8_0" else _nibbles(q))
    return torch.cat(parts, dim=2).view(rows, -1)


def _repeated(values: Tensor, times: int) -> Tensor:
    """float16 [N, G] as the bytes [N, G times, 2] of the blocks of every group."""
    return values.repeat_interleave(times, dim=1)[:, :, None].view(torch.uint8)


def _nibbles(q: Tensor) -> Tensor:
    """int4 [N, B, 32] as bytes [N, B, 16]: byte i holds column i in its low half and column i + 16 in its high half."""
    shifted = (q + _OFFSET).to(torch.uint8)
    return shifted[:, :, : BLOCK // 2] | (shifted[:, :, BLOCK // 2 :] << 4)
