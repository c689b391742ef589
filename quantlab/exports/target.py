"""What a format of other programs is, and what an artifact contains as far as a format must know. Does not import torch.

A format has two parts. The part in this folder needs no torch: its name and what it cannot express; the plan uses it, so that
nothing is refused after the work. The writer in `quantlab.exports.writers` reads the artifact and writes the files.
`quantlab.exports.targets` and `quantlab.exports.writers.table` list all formats.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from quantlab.architectures.architecture import Architecture, Role
from quantlab.numerics.number_format import NumberFormat
from quantlab.recipe.schemes import FormatName

Progress = Callable[[int], None]
"""Called after each weight with its number of elements."""


@dataclass(frozen=True)
class Weight:
    """One weight of an artifact, quantized or not.

    Attributes:
        name: its logical name, ending in ".weight" if it is quantized.
        role: what it is for.
        number: its number format; None where it is not quantized.
        dtype: dtype word of its tensor, or of its scales if it is quantized.
        shape: of the weight; [N, K] if it is quantized.
    """

    name: str
    role: Role
    number: NumberFormat | None
    dtype: str
    shape: tuple[int, ...]

    @property
    def module(self) -> str:
        """The name of its module."""
        return self.name.rpartition(".")[0]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Contents:
    """What an artifact contains, known from its plan as well as from its headers.

    Attributes:
        architecture: its family.
        config: its config.json without `quantization_config`.
        weights: all weights, in the order of the artifact's files.
        directory: where its tokenizer and other companion files are: the artifact, or, before it is made, its source.
    """

    architecture: Architecture
    config: Mapping[str, Any] = field(repr=False)
    weights: tuple[Weight, ...] = field(repr=False)
    directory: Path

    @property
    def elements(self) -> int:
        """Number of elements of all weights."""
        return sum(weight.elements for weight in self.weights)

    @property
    def quantized(self) -> tuple[Weight, ...]:
        """The weights that are quantized."""
        return tuple(weight for weight in self.weights if weight.number is not None)


class Target(Protocol):
    """A format of other programs."""

    @property
    def name(self) -> FormatName:
        """Its word in recipes and on the command line."""

    @property
    def description(self) -> str:
        """What is written and who reads it, in one line."""

    def refuses(self, contents: Contents) -> str | None:
        """Why the format cannot express an artifact, None if it can. Reads no weights."""
