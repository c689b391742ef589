"""The format `onnx`: a float32 graph of a dense model whose quantized products hold the artifact's integers. Does not import torch.

Products are onnxruntime's operator MatMulNBits: its specification has blocks of a power of two of at least 16 columns, and unsigned
integers with a zero point per block.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantlab.formats.contents import Contents, Weight
from quantlab.recipe.schemes import FormatName

LARGEST_BLOCK = 128
"""Columns that share a scale in the graph, at most, where a matrix has one scale per row: it is repeated."""
_SMALLEST_BLOCK = 16
_BY_LENGTH = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True)
class Onnx:
    """See the module's docstring."""

    name: FormatName = "onnx"
    description: str = "an ONNX graph whose products hold the same integers (MatMulNBits), for onnxruntime"

    def refuses(self, contents: Contents) -> str | None:
        """See `Target`."""
        if contents.architecture.mixture is not None:
            return "routed experts: the exporter records the experts that its example tokens chose, for all tokens"
        rotary = _rotary_kind(contents.config)
        if rotary in _BY_LENGTH:
            return f"rotary frequencies of kind {rotary!r} depend on the length of the text, and a recorded graph has one set of them"
        reasons = (reason for weight in contents.quantized if (reason := _refuses(weight)) is not None)
        return next(reasons, None)


def block_of(weight: Weight) -> int:
    """Columns that share a scale in the graph."""
    assert weight.number is not None, "it is quantized"
    return weight.number.group_size or math.gcd(weight.shape[1], LARGEST_BLOCK)


def _rotary_kind(config: Mapping[str, Any]) -> str:
    """The kind of rotary embedding, in the fields of transformers 5 or 4."""
    section = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return str(section.get("rope_type") or section.get("type") or "default")


def _refuses(weight: Weight) -> str | None:
    number = weight.number
    assert number is not None, "it is quantized"
    if not (number.is_integer and number.bits in {4, 8} and number.by_row):
        return f"{number.name}: MatMulNBits holds integers of 4 and 8 bits with scales by row ({weight.name})"
    block = block_of(weight)
    if block < _SMALLEST_BLOCK or block & (block - 1) or weight.shape[1] % block:
        return f"blocks of {block} in {weight.shape[1]} columns: MatMulNBits takes whole blocks of a power of two ({weight.name})"
    return None


TARGET = Onnx()
