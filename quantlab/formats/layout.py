"""Layouts: the tensors that store one weight on disk, and their description in config.json.

A layout has two parts. The part in this folder needs no torch: names, dtypes and shapes of the stored tensors, the
formats it can express, and its part of config.json; the plan uses it. The codec in `quantlab.formats.codecs` converts
matrices to those tensors and back. `quantlab.formats.layouts` and `quantlab.formats.codecs.table` list all layouts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from quantlab.architectures.architecture import Role
from quantlab.checkpoint.header import DTYPE_BITS, TensorEntry
from quantlab.numerics.number_format import NumberFormat
from quantlab.recipe.schemes import LayoutName

StoredTensor = tuple[str, str, tuple[int, ...]]
"""Name, dtype word and shape of a tensor on disk."""


def stored_bytes(tensor: StoredTensor) -> int:
    """Bytes of a tensor on disk."""
    return math.prod(tensor[2]) * DTYPE_BITS[tensor[1]] // 8


class Layout(Protocol):
    """How one weight is stored."""

    @property
    def name(self) -> LayoutName:
        """Its name."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Suffixes of the stored tensors' names after the module's name and a dot; the quantized values come first."""

    def can_express(self, number: NumberFormat) -> str | None:
        """Why the layout cannot store a format, None if it can."""

    def stored_tensors(
        self, name: str, shape: tuple[int, ...], number: NumberFormat | None, dtype: str
    ) -> tuple[StoredTensor, ...]:
        """The tensors of a weight, in the order they are written.

        Args:
            name: the weight's name, ending in ".weight" where it is quantized.
            shape: of the weight.
            number: its format; None where it is not quantized.
            dtype: dtype word of the artifact, for scales or for the weight itself.
        """


@dataclass(frozen=True)
class Stored:
    """How a checkpoint stores one quantized weight.

    Attributes:
        number: its format.
        layout: its layout.
        numbers: the tensor with the quantized values.
        scale: the tensor with the scales.
        parts: all of its tensors, `numbers` first.
        shape: rows N and columns K of the weight; for packed integers K is rounded up to whole words.
    """

    number: NumberFormat
    layout: LayoutName
    numbers: TensorEntry
    scale: TensorEntry
    parts: tuple[TensorEntry, ...]

    shape: tuple[int, int]

    @property
    def elements(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


class Description(Protocol):
    """A checkpoint's description of its quantized weights."""

    @property
    def formats(self) -> tuple[NumberFormat, ...]:
        """Its number formats, in the order of the description."""

    def stored(self, name: str, tensors: Mapping[str, TensorEntry]) -> Stored | None:
        """How the weight `name` is stored, None if its tensors are not quantized.

        Raises:
            ArtifactError, CheckpointError: tensors and description contradict each other, or the format is not
                supported.
        """

    def to_json(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""


@dataclass(frozen=True)
class Linear:
    """One linear of an artifact, quantized or not.

    Attributes:
        module: its name (the weight's name without ".weight").
        role: what it is for.
        layer: index of its decoder layer, 0 outside them.
        number: its format; None where it is not quantized.
        layout: how it is stored.
    """

    module: str
    role: Role
    layer: int
    number: NumberFormat | None
    layout: LayoutName


@dataclass(frozen=True)
class Method:
    """Layouts that share one kind of `quantization_config`.

    Attributes:
        word: its `quant_method`.
        layouts: those it describes.
        parse: parses a `quantization_config`; the second argument is its location, for errors.
        describe: describes the linears of an artifact, at least one of them quantized; None if the method is only read.
        is_source: whether recipes may start from such a checkpoint; its values are floating point and expanded when
            read.
        file: a file of the checkpoint that contains the description if config.json has none; empty if there is none.
    """

    word: str
    layouts: tuple[Layout, ...]
    parse: Callable[[Mapping[str, Any], str], Description]
    describe: Callable[[Sequence[Linear]], Description] | None = None
    is_source: bool = False
    file: str = ""


@dataclass(frozen=True)
class Dense:
    """An unquantized weight: one floating-point tensor."""

    name: LayoutName = "dense"
    parts: tuple[str, ...] = ("weight",)

    def can_express(self, number: NumberFormat) -> str | None:
        """Why the layout cannot store a format, None if it can."""
        return f"{number.name} has scales, which a plain tensor has no place for"

    def stored_tensors(
        self, name: str, shape: tuple[int, ...], number: NumberFormat | None, dtype: str
    ) -> tuple[StoredTensor, ...]:
        """See `Layout`."""
        assert number is None, "a quantized weight has another layout"
        return ((name, dtype, shape),)


def present(prefix: str, parts: Sequence[str], tensors: Mapping[str, TensorEntry]) -> tuple[TensorEntry, ...]:
    """The existing tensors of a weight; `prefix` is its module's name with a dot."""
    return tuple(tensors[prefix + part] for part in parts if prefix + part in tensors)
