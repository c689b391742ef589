"""Encodes and decodes the GPTQ layouts; transposed, `qweight` is packed like `weight_packed` of compressed-tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from quantlab.formats.codecs.checks import asymmetric, check_order, check_scales
from quantlab.formats.misfit import misfit
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.number_format import NumberFormat
from quantlab.numerics.packing import pack_int32, unpack_int32


def encode(name: str, matrix: QuantizedMatrix, *, zero_offset: int) -> dict[str, Tensor]:
    """The tensors of the weight `name` [N, K]; N and K are multiples of 32 / bits.

    Args:
        name: ending in ".weight".
        matrix: symmetric integers.
        zero_offset: the layout's subtrahend for stored zero points: 1 for "gptq", 0 for "gptq_v2".
    """
    (rows, columns), groups = matrix.q.shape, matrix.scale.shape[1]
    prefix = name.removesuffix("weight")
    zeros = torch.full((groups, rows), -zero_offset, dtype=torch.int8)  # 0 is the middle of the grid
    return {
        prefix + "qweight": pack_int32(matrix.q, bits=matrix.bits).t().contiguous(),
        prefix + "scales": matrix.scale.t().contiguous(),
        prefix + "qzeros": pack_int32(zeros, bits=matrix.bits),
        prefix + "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // groups),
    }


def decode(name: str, stored: Mapping[str, Tensor], number: NumberFormat, *, zero_offset: int) -> QuantizedMatrix:
    """The inverse of `encode`.

    Args:
        name: the weight's name, ending in ".weight".
        stored: its parts by name; `qzeros` and `g_idx` may be missing.
        number: its format.
        zero_offset: as for `encode`.

    Raises:
        ArtifactError: zero points off the middle, columns out of order, or parts that do not fit.
        CheckpointError: a scale is zero or not finite.
    """
    prefix, bits = name.removesuffix("weight"), number.bits
    words, scales = stored[prefix + "qweight"], stored[prefix + "scales"]
    columns, (groups, rows) = words.shape[0] * 32 // bits, scales.shape
    if words.dtype != torch.int32:
        raise misfit(name, f"integers of {words.dtype}")
    check_scales(prefix + "scales", scales, signed=True)
    if words.shape[1] != rows or columns % groups:
        raise misfit(name, f"qweight {list(words.shape)} with scales {list(scales.shape)}")
    if (order := stored.get(prefix + "g_idx")) is not None:
        check_order(name, order, columns=columns, groups=groups)
    if (zeros := stored.get(prefix + "qzeros")) is not None:
        if tuple(zeros.shape) != (groups, -(-rows * bits // 32)):
            raise misfit(name, f"qzeros {list(zeros.shape)} with scales {list(scales.shape)}")
        if not bool((unpack_int32(zeros, bits=bits, columns=rows) == -zero_offset).all()):
            raise asymmetric(name)
    q = unpack_int32(words.t().contiguous(), bits=bits, columns=columns)
    return QuantizedMatrix(q, scales.t().contiguous(), bits)
