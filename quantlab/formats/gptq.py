"""The GPTQ layout: how AutoGPTQ and its successor GPTQModel store integers, and how config.json describes them.

A linear [N, K] of b bits in G groups of columns is four tensors: `qweight` [K b / 32, N] int32, consecutive inputs in one
word, lowest bits first, as unsigned numbers; `scales` [G, N]; `qzeros` [G, N b / 32] int32, consecutive outputs in one word;
`g_idx` [K] int32, the group of every input. The transpose of `qweight` is the packing of compressed-tensors. The first format
("gptq") stores zero points less one, the second ("gptq_v2") as they are. Only symmetric integers are read: every zero point
is 2^(b - 1), and the weight is ``(unsigned - 2^(b - 1)) * scale``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from quantlab.checkpoint.header import TensorEntry
from quantlab.errors import ArtifactError
from quantlab.formats.checks import asymmetric, check_order, misfit
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.packing import pack_int32, unpack_int32
from quantlab.recipe.schemes import READABLE, Scheme, find_scheme

QUANT_METHOD: Final = "gptq"
CONFIG_NAME: Final = "quantize_config.json"
"""Where the description lies if config.json has none."""
PARTS: Final = ("qweight", "qzeros", "scales", "g_idx")
_ZERO_OFFSETS: Final[Mapping[str, int]] = {"gptq": 1, "gptq_v2": 0}
"""What each format takes off a zero point before storing it."""


def encode(name: str, matrix: QuantizedMatrix) -> dict[str, Tensor]:
    """The stored tensors of the weight `name` [N, K] in the first format; N and K are multiples of 32 / bits."""
    (rows, columns), groups = matrix.q.shape, matrix.scale.shape[1]
    prefix = name.removesuffix("weight")
    zeros = torch.full((groups, rows), -1, dtype=torch.int8)  # the middle of the grid less one
    return {
        prefix + "qweight": pack_int32(matrix.q, bits=matrix.bits).t().contiguous(),
        prefix + "qzeros": pack_int32(zeros, bits=matrix.bits),
        prefix + "scales": matrix.scale.t().contiguous(),
        prefix + "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // groups),
    }


@dataclass(frozen=True)
class GptqConfig:
    """What a checkpoint of this layout says of itself.

    Attributes:
        bits: width of the integers.
        group_size: columns that share a scale; None for one scale per row.
        overridden: whether some linears have numbers of their own (GPTQModel's `dynamic`).
        zero_offset: what was taken off the zero points.
        where: the file and key it stands in.
    """

    bits: int
    group_size: int | None
    overridden: bool
    zero_offset: int
    where: str

    def scheme_stored(self, name: str, tensors: Mapping[str, TensorEntry]) -> Scheme | None:
        """The scheme of the weight `name` as its tensors have it, None if it is stored as floating point.

        Raises:
            ArtifactError: they disagree with the description, or are of numbers quantlab does not read.
        """
        prefix = name.removesuffix("weight")
        integers = tensors.get(prefix + "qweight")
        if integers is None:
            return None
        scales, order = tensors.get(prefix + "scales"), tensors.get(prefix + "g_idx")
        if scales is None or len(scales.shape) != 2 or len(integers.shape) != 2:
            raise misfit(name, f"qweight {list(integers.shape)}, scales {list(scales.shape) if scales else 'missing'}")
        bits = 32 * integers.shape[0] // order.elements if order is not None and order.elements else self.bits
        columns, groups = 32 * integers.shape[0] // max(bits, 1), scales.shape[0]
        expected = columns // (self.group_size or columns or 1)
        if not self.overridden and (bits, groups) != (self.bits, expected):
            raise misfit(name, f"{bits} bits in {groups} groups, {self.where} says {self.bits} bits in {expected}")
        per_row = groups == 1 and (bits == 8 or columns not in {32, 64, 128})
        scheme = find_scheme(bits, None if per_row else columns // max(groups, 1))
        if scheme is None:
            raise _unreadable(name, f"{bits} bits in groups of {columns // max(groups, 1)}")
        return scheme

    def decode(self, name: str, stored: Mapping[str, Tensor], scheme: Scheme) -> QuantizedMatrix:
        """The inverse of `encode`, for both formats.

        Args:
            name: the weight's name, ending in ".weight".
            stored: its parts by name; `qzeros` and `g_idx` may be missing.
            scheme: as found by `scheme_stored`.

        Raises:
            ArtifactError: zero points off the middle, columns out of order, or parts that do not fit.
        """
        prefix = name.removesuffix("weight")
        words, scales = stored[prefix + "qweight"], stored[prefix + "scales"]
        columns, (groups, rows) = words.shape[0] * 32 // scheme.bits, scales.shape
        if words.shape[1] != rows or columns % groups:
            raise misfit(name, f"qweight {list(words.shape)} with scales {list(scales.shape)}")
        if (order := stored.get(prefix + "g_idx")) is not None:
            check_order(name, order, columns=columns, groups=groups)
        if (zeros := stored.get(prefix + "qzeros")) is not None:
            if tuple(zeros.shape) != (groups, -(-rows * scheme.bits // 32)):
                raise misfit(name, f"qzeros {list(zeros.shape)} with scales {list(scales.shape)}")
            if not bool((unpack_int32(zeros, bits=scheme.bits, columns=rows) == -self.zero_offset).all()):
                raise asymmetric(name)
        q = unpack_int32(words.t().contiguous(), bits=scheme.bits, columns=columns)
        return QuantizedMatrix(q, scales.t().contiguous(), scheme.bits)


def parse_config(described: Mapping[str, Any], *, where: str) -> GptqConfig:
    """Read a `quantization_config` of method gptq, or a quantize_config.json.

    Raises:
        ArtifactError: it describes a layout or numbers quantlab does not read.
    """
    bits, group_size = described.get("bits"), described.get("group_size", -1)
    layout = described.get("checkpoint_format") or "gptq"
    if not isinstance(layout, str) or layout not in _ZERO_OFFSETS or described.get("is_marlin_format"):
        raise ArtifactError(
            "the checkpoint is in a layout of GPTQ quantlab does not read",
            where=f"{where}, checkpoint_format",
            found="marlin" if described.get("is_marlin_format") else repr(layout),
            fix="readable: " + ", ".join(_ZERO_OFFSETS),
        )
    if not isinstance(bits, int) or not isinstance(group_size, int | None) or group_size == 0:
        raise _unreadable(where, f"bits {bits!r}, group_size {group_size!r}")
    columns = None if group_size is None or group_size < 0 else group_size
    if find_scheme(bits, columns) is None:
        raise _unreadable(where, f"{bits} bits in groups of {group_size}")
    return GptqConfig(bits, columns, bool(described.get("dynamic")), _ZERO_OFFSETS[layout], where)


def _unreadable(where: str, found: str) -> ArtifactError:
    return ArtifactError(
        "the checkpoint's numbers are of a kind quantlab does not read",
        where=where,
        found=found,
        fix="readable as GPTQ: "
        + "; ".join(scheme.description for scheme in READABLE if not scheme.quantized_activations),
    )
