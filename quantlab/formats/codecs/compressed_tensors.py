"""Encodes and decodes the layouts of compressed-tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from quantlab.formats.codecs.checks import asymmetric, check_order, check_scales
from quantlab.formats.misfit import misfit
from quantlab.numerics.integer import QuantizedMatrix, integer_range
from quantlab.numerics.number_format import NumberFormat
from quantlab.numerics.packing import pack_int32, unpack_int32


def encode_packed(name: str, matrix: QuantizedMatrix) -> dict[str, Tensor]:
    """The tensors of `pack-quantized` for the weight `name`, in the order of its layout."""
    prefix = name.removesuffix("weight")
    stored = {
        prefix + "weight_packed": pack_int32(matrix.q, bits=matrix.bits),
        prefix + "weight_scale": matrix.scale,
        prefix + "weight_shape": torch.tensor(matrix.q.shape, dtype=torch.int64),
    }
    if matrix.zero is not None:
        lowest, padding = integer_range(matrix.bits)[0], -len(matrix.zero) % (32 // matrix.bits)
        rows = functional.pad(matrix.zero.t(), (0, padding), value=lowest)  # the library pads words with zero bits
        stored[prefix + "weight_zero_point"] = pack_int32(rows.contiguous(), bits=matrix.bits).t().contiguous()
    return stored


def encode_plain(name: str, matrix: QuantizedMatrix) -> dict[str, Tensor]:
    """The tensors of `int-quantized`, or of FP8 values of `float-quantized`, for the weight `name`, in the order of its layout."""
    return {name: matrix.q, name.removesuffix("weight") + "weight_scale": matrix.scale}


def decode(name: str, stored: Mapping[str, Tensor], number: NumberFormat) -> QuantizedMatrix:
    """The inverse of `encode_packed` and `encode_plain`, also for checkpoints of llm-compressor.

    Args:
        name: the weight's name, ending in ".weight".
        stored: its tensors by name. Integers are packed if there is a `weight_packed`, else int8; scales per row may
            lack their second dimension; `weight_shape` may be missing; zero points of symmetric formats must be zero,
            `weight_g_idx` in order.
        number: its format.

    Raises:
        ArtifactError: the tensors contradict the format or each other, or have a format that quantlab does not read.
        CheckpointError: a scale is zero or not finite.
    """
    prefix = name.removesuffix("weight")
    scale, words = stored[prefix + "weight_scale"], stored.get(prefix + "weight_packed")
    if scale.dim() == 1:
        scale = scale[:, None]
    q = stored[name] if words is None else _unpacked(name, words, stored.get(prefix + "weight_shape"), number.bits)
    if q.dtype != torch.int8:
        raise misfit(name, f"integers of {q.dtype}")
    rows, columns = q.shape
    if not number.fits((rows, columns)) or tuple(scale.shape) != number.scale_shape((rows, columns)):
        raise misfit(name, f"scales {list(scale.shape)} for a weight of {[rows, columns]} as {number.name}")
    check_scales(prefix + "weight_scale", scale, signed=True)
    if (order := stored.get(prefix + "weight_g_idx")) is not None:
        check_order(name, order, columns=columns, groups=scale.shape[1])
    zeros = stored.get(prefix + "weight_zero_point")
    if not number.symmetric:
        return QuantizedMatrix(q, scale, number.bits, _unpacked_zeros(name, zeros, tuple(scale.shape), number.bits))
    if zeros is not None and bool((zeros != 0).any()):
        raise asymmetric(name)
    return QuantizedMatrix(q, scale, number.bits)


def decode_floats(name: str, stored: Mapping[str, Tensor], number: NumberFormat) -> QuantizedMatrix:
    """The matrix of a weight of `float-quantized`.

    Args:
        name: the weight's name, ending in ".weight".
        stored: `weight` [N, K] float8_e4m3fn and `weight_scale` by name; the scale of a matrix may be [1], of rows [N].
        number: its format.

    Raises:
        ArtifactError: the scales do not fit the weight.
        CheckpointError: a scale is not positive or not finite.
    """
    q, scale = stored[name], stored[f"{name}_scale"]
    rows, columns = q.shape
    grid = number.scale_shape((rows, columns))
    if scale.numel() != grid[0] * grid[1] or (scale.dim() > 1 and tuple(scale.shape) != grid):
        raise misfit(name, f"scales {list(scale.shape)} for a weight of {[rows, columns]} as {number.name}")
    check_scales(f"{name}_scale", scale)
    size = number.granularity.rows or rows, number.granularity.columns or columns
    return QuantizedMatrix(q, scale.view(grid), number.bits, block=size)


def _unpacked_zeros(name: str, words: Tensor | None, shape: tuple[int, ...], bits: int) -> Tensor:
    """[N, G] int8 of the words [N b / 32, G] int32."""
    rows, groups = shape
    if words is None or words.dtype != torch.int32 or tuple(words.shape) != (-(-rows * bits // 32), groups):
        found = "missing" if words is None else f"{list(words.shape)} of {words.dtype}"
        raise misfit(name, f"zero points {found} for scales {list(shape)}")
    return unpack_int32(words.t().contiguous(), bits=bits, columns=rows).t().contiguous()


def _unpacked(name: str, words: Tensor, shape: Tensor | None, bits: int) -> Tensor:
    per_word = 32 // bits
    columns = words.shape[1] * per_word if shape is None else int(shape.flatten()[-1])
    if words.dtype != torch.int32 or words.shape[1] != -(-columns // per_word):
        raise misfit(name, f"{list(words.shape)} words of {words.dtype} for {columns} columns of {bits} bits")
    return unpack_int32(words, bits=bits, columns=columns)
