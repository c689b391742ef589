"""Encodes and decodes DeepSeek's FP8 blocks."""

from collections.abc import Mapping

from torch import Tensor

from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.number_format import NumberFormat


def encode(name: str, matrix: QuantizedMatrix) -> dict[str, Tensor]:
    """The tensors of the weight `name`, in the order of the layout."""
    return {name: matrix.q, f"{name}_scale_inv": matrix.scale}


def decode(name: str, stored: Mapping[str, Tensor], number: NumberFormat) -> QuantizedMatrix:
    """The matrix of the weight `name`.

    Args:
        name: the weight's name, ending in ".weight".
        stored: `weight` [N, K] float8_e4m3fn and `weight_scale_inv` by name; their shapes fit.
        number: its format.
    """
    rows, columns = number.granularity.rows, number.granularity.columns
    assert rows is not None and columns is not None, "the layout has blocks"  # noqa: PT018
    return QuantizedMatrix(stored[name], stored[f"{name}_scale_inv"], number.bits, block=(rows, columns))
