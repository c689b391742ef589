"""Encodes and decodes DeepSeek's FP8 blocks."""

from collections.abc import Mapping

import torch
from torch import Tensor

from quantlab.formats.codecs.checks import check_scales
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.number_format import NumberFormat


def encode(name: str, matrix: QuantizedMatrix) -> dict[str, Tensor]:
    """The tensors of the weight `name`, in the order of the layout."""
    return {name: matrix.q, f"{name}_scale_inv": matrix.scale}


def decode(name: str, stored: Mapping[str, Tensor], number: NumberFormat) -> QuantizedMatrix:
    """The matrix of the weight `name`.

    Args:
        name: the weight's name, ending in ".weight".
        stored: `weight` [N, K] float8_e4m3fn and `weight_scale_inv` by name; their shapes fit. Scales are floating
            point; bytes are the exponents of powers of two (UE8M0).
        number: its format.

    Raises:
        CheckpointError: a scale is not positive or not finite.
    """
    rows, columns = number.granularity.rows, number.granularity.columns
    assert rows is not None and columns is not None, "the layout has blocks"  # noqa: PT018
    scale = stored[f"{name}_scale_inv"]
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    check_scales(f"{name}_scale_inv", scale)
    return QuantizedMatrix(stored[name], scale, number.bits, block=(rows, columns))
