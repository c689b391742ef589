"""The layouts of compressed-tensors: the tensors of one weight, and the formats they can express."""

from dataclasses import dataclass
from typing import Final

from quantlab.formats.layout import StoredTensor
from quantlab.numerics.number_format import E4M3, INT4, INT8, ROW, Activations, NumberFormat
from quantlab.recipe.schemes import LayoutName

_GROUP_SIZES: Final = (None, 32, 64, 128)


@dataclass(frozen=True)
class PackQuantized:
    """Integers packed into int32 words along each row."""

    name: LayoutName = "pack-quantized"
    parts: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")

    def can_express(self, number: NumberFormat) -> str | None:
        """Why the layout cannot store a format, None if it can."""
        if not number.symmetric and number.element != INT4:
            return "zero points are supported for int4 only"
        return _inexpressible(number)

    def stored_tensors(
        self, name: str, shape: tuple[int, ...], number: NumberFormat | None, dtype: str
    ) -> tuple[StoredTensor, ...]:
        """See `Layout`."""
        assert number is not None, "a quantized weight has a format"
        rows, columns = shape
        prefix = name.removesuffix("weight")
        zeros = (-(-rows * number.bits // 32), number.groups(columns))
        return (
            (prefix + "weight_packed", "I32", (rows, columns * number.bits // 32)),
            (prefix + "weight_scale", dtype, number.scale_shape((rows, columns))),
            (prefix + "weight_shape", "I64", (2,)),
            *(() if number.symmetric else ((prefix + "weight_zero_point", "I32", zeros),)),
        )


@dataclass(frozen=True)
class IntQuantized:
    """Integers stored as int8."""

    name: LayoutName = "int-quantized"
    parts: tuple[str, ...] = ("weight", "weight_scale", "weight_zero_point", "weight_g_idx")

    def can_express(self, number: NumberFormat) -> str | None:
        """Why the layout cannot store a format, None if it can."""
        return _inexpressible(number) if number.symmetric else "zero points are supported for packed integers only"

    def stored_tensors(
        self, name: str, shape: tuple[int, ...], number: NumberFormat | None, dtype: str
    ) -> tuple[StoredTensor, ...]:
        """See `Layout`."""
        assert number is not None, "a quantized weight has a format"
        prefix = name.removesuffix("weight")
        return (name, "I8", shape), (prefix + "weight_scale", dtype, number.scale_shape((shape[0], shape[1])))


@dataclass(frozen=True)
class FloatQuantized:
    """FP8 e4m3 values."""

    name: LayoutName = "float-quantized"
    parts: tuple[str, ...] = ("weight", "weight_scale")

    def can_express(self, number: NumberFormat) -> str | None:
        """Why the layout cannot store a format, None if it can."""
        if number.element != E4M3:
            return f"{number.element} is not {E4M3}"
        return None if number.symmetric else "floating-point formats have no zero points"

    def stored_tensors(
        self, name: str, shape: tuple[int, ...], number: NumberFormat | None, dtype: str
    ) -> tuple[StoredTensor, ...]:
        """See `Layout`."""
        assert number is not None, "a quantized weight has a format"
        scale = number.scale_shape((shape[0], shape[1]))
        return (name, "F8_E4M3", shape), (name + "_scale", number.scale or dtype, scale)


def _inexpressible(number: NumberFormat) -> str | None:
    """Why compressed-tensors' integer layouts, as quantlab reads them, cannot store a format; None if they can."""
    if not number.is_integer or number.bits not in {4, 8}:
        return f"{number.element} is not a 4- or 8-bit integer"
    if not number.by_row or number.group_size not in _GROUP_SIZES:
        return f"scales must belong to rows, or to groups of {', '.join(str(size) for size in _GROUP_SIZES if size)} columns"
    if number.activations is not None and number != NumberFormat(INT8, ROW, activations=Activations(INT8)):
        return "activations can only be int8 per token, with int8 weights per row"
    return None


PACKED: Final = PackQuantized()
PLAIN: Final = IntQuantized()
FLOAT: Final = FloatQuantized()
