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
        matrix: symmetric integers; with an offset of 0 also asymmetric ones.
        zero_offset: the layout's subtrahend for stored zero points: 1 for "gptq", 0 for "gptq_v2".
    """
    (rows, columns), groups = matrix.q.shape, matrix.scale.shape[1]
    prefix = name.removesuffix("weight")
    assert matrix.zero is None or not zero_offset, "the first layout has symmetric integers"
    middle = torch.full((groups, rows), -zero_offset, dtype=torch.int8)  # 0 is the middle of the grid
    zeros = middle if matrix.zero is None else matrix.zero.t().contiguous()
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
        stored: its parts by name; `g_idx` may be missing, and in symmetric formats `qzeros`.
        number: its format.
        zero_offset: as for `encode`.

    Raises:
        ArtifactError: zero points of a symmetric format off the middle, columns out of order, or parts that do not fit.
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
    q = unpack_int32(words.t().contiguous(), bits=bits, columns=columns)
    zeros = _unpacked_zeros(name, stored.get(prefix + "qzeros"), (groups, rows), bits)
    if not number.symmetric:
        if zeros is None:
            raise misfit(name, f"no {prefix}qzeros, and the integers are asymmetric")
        return QuantizedMatrix(q, scales.t().contiguous(), bits, zeros.t().contiguous())
    if zeros is not None and not bool((zeros == -zero_offset).all()):
        raise asymmetric(name)
    return QuantizedMatrix(q, scales.t().contiguous(), bits)


def _unpacked_zeros(name: str, words: Tensor | None, shape: tuple[int, int], bits: int) -> Tensor | None:
    """[G, N] int8 of the words [G, ceil(N b / 32)] int32, None without words."""
    groups, rows = shape
    if words is None:
        return None
    if words.dtype != torch.int32 or tuple(words.shape) != (groups, -(-rows * bits // 32)):
        raise misfit(name, f"qzeros {list(words.shape)} of {words.dtype} with scales {list(shape)}")
    return unpack_int32(words, bits=bits, columns=rows)
