"""The layout of DeepSeek-V3 and R1: FP8 e4m3 weights with one float32 scale per block of 128 x 128.

A linear [N, K] is stored as two tensors: `weight` [N, K] F8_E4M3 and `weight_scale_inv` [ceil(N/128), ceil(K/128)] F32,
which may be in another shard. Scales of other floating dtypes are read too, powers of two among them: F8_E8M0, or plain
bytes with the exponents where the config says `scale_fmt: ue8m0`. The block size is in config.json (`weight_block_size`); it cannot be derived from the
shapes, because the last blocks may be ragged (see `quantlab.numerics.fp8`). Engines also round activations to FP8, with
one scale per token and 128 channels.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from quantlab.checkpoint.header import TensorEntry
from quantlab.errors import CheckpointError
from quantlab.formats.layout import Linear, Method, Stored, StoredTensor, present
from quantlab.formats.misfit import FLOAT_SCALES, check_scale_dtype
from quantlab.numerics.number_format import E4M3, Activations, NumberFormat, block
from quantlab.recipe.schemes import LayoutName

_SCALE: Final = "_scale_inv"
"""The scale of weight X is the tensor X_scale_inv."""
_WEIGHT_DTYPE: Final = "F8_E4M3"
_EXPERT: Final = re.compile(r"\.experts\.\d+\..*")


@dataclass(frozen=True)
class Fp8BlocksLayout:
    """The layout of one weight."""

    name: LayoutName = "fp8-blocks"
    parts: tuple[str, ...] = ("weight", "weight" + _SCALE)

    def can_express(self, number: NumberFormat) -> str | None:
        """Why the layout cannot store a format, None if it can."""
        if number.element != E4M3:
            return f"{number.element} is not {E4M3}"
        if number.granularity.rows is None or number.granularity.columns is None or number.by_row:
            return "scales must belong to blocks of several rows and columns"
        return None if number.scale == "F32" else "scales must be float32"

    def stored_tensors(
        self, name: str, shape: tuple[int, ...], number: NumberFormat | None, dtype: str
    ) -> tuple[StoredTensor, ...]:
        """See `Layout`."""
        assert number is not None, "a quantized weight has a format"
        grid = number.scale_shape((shape[0], shape[1]))
        return (name, _WEIGHT_DTYPE, shape), (name + _SCALE, number.scale, grid)


LAYOUT: Final = Fp8BlocksLayout()


@dataclass(frozen=True)
class Fp8Blocks:
    """The description of the weights of a checkpoint in this layout.

    Attributes:
        number: the format of its quantized linears.
        unconverted: names of modules that are not quantized, for engines; the experts of a layer are one module.
            Reading does not need it, because the tensors' dtypes show it.
        bytes_are_exponents: whether scales of dtype U8 are exponents of two (`scale_fmt: ue8m0`).
    """

    number: NumberFormat
    unconverted: tuple[str, ...] = ()
    bytes_are_exponents: bool = False

    def __str__(self) -> str:
        return f"FP8 in blocks of {self.number.granularity.rows}x{self.number.granularity.columns}"

    @property
    def formats(self) -> tuple[NumberFormat, ...]:
        """The one number format there is."""
        return (self.number,)

    def stored(self, name: str, tensors: Mapping[str, TensorEntry]) -> Stored | None:
        """How the weight `name` is stored, None if it is not FP8.

        Raises:
            CheckpointError: it is no matrix, or has no scale, or one of another shape or of a dtype that is not read.
        """
        weight = tensors.get(name)
        if weight is None or weight.dtype != _WEIGHT_DTYPE:
            return None
        if len(weight.shape) != 2 or not name.endswith("weight"):
            raise CheckpointError(
                "a tensor is FP8 that cannot have blocks",
                where=f"{weight.file}, {name}",
                found=f"{weight.dtype} {list(weight.shape)}",
                fix="only weights of linears, with two dimensions, may be FP8; use the original release",
            )
        scale = tensors.get(name + _SCALE)
        if scale is None:
            raise _no_scale(name, weight)
        parts = present(name.removesuffix("weight"), LAYOUT.parts, tensors)
        exponents = ("F8_E8M0", "U8") if self.bytes_are_exponents else ("F8_E8M0",)
        check_scale_dtype(scale, (*FLOAT_SCALES, *exponents))
        if scale.shape != self.number.scale_shape((weight.shape[0], weight.shape[1])):
            raise CheckpointError(
                "a scale does not fit its weight",
                where=f"{scale.file}, {scale.name}",
                found=f"{list(scale.shape)} for a weight of {list(weight.shape)}, {self}",
                fix="download the shard again, and the config.json of the same release",
            )
        return Stored(self.number, LAYOUT.name, weight, scale, parts, (weight.shape[0], weight.shape[1]))

    def to_json(self) -> dict[str, Any]:
        """The `quantization_config` of config.json, as DeepSeek releases it, with the modules that engines must not convert.

        transformers matches these names as regular expressions at the start of a module's name, vLLM and SGLang as
        whole names.
        """
        granularity = self.number.granularity
        described = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": METHOD.word,
            "weight_block_size": [granularity.rows, granularity.columns],
        }
        return described | ({"modules_to_not_convert": list(self.unconverted)} if self.unconverted else {})


def _no_scale(name: str, weight: TensorEntry) -> CheckpointError:
    return CheckpointError(
        "an FP8 weight has no scale",
        where=str(weight.file),
        found=f"no {name}{_SCALE}",
        fix="download the complete checkpoint",
    )


def _no_block_size(where: str, found: str) -> CheckpointError:
    return CheckpointError(
        "the FP8 checkpoint does not say its block size",
        where=where,
        found=found,
        fix="use the config.json of the original release, which has [128, 128]",
    )


def parse_config(described: Mapping[str, Any], where: str) -> Fp8Blocks:
    """Read a `quantization_config` of method fp8.

    Raises:
        CheckpointError: it does not say how large the blocks are, or names modules otherwise than in a list.
    """
    size = described.get("weight_block_size")
    if not (isinstance(size, list) and len(size) == 2 and all(type(one) is int and one > 0 for one in size)):
        raise _no_block_size(f"{where}, quantization_config.weight_block_size", repr(size))
    unconverted = described.get("modules_to_not_convert") or []
    if not (isinstance(unconverted, list) and all(isinstance(name, str) for name in unconverted)):
        raise CheckpointError(
            "the modules that are not FP8 are no list of names",
            where=f"{where}, quantization_config.modules_to_not_convert",
            found=repr(unconverted)[:120],
            fix="use the config.json of the original release",
        )
    number = NumberFormat(E4M3, block(*size), scale="F32", activations=Activations(E4M3, size[1]))
    exponents = str(described.get("scale_fmt")).lower() == "ue8m0"
    return Fp8Blocks(number, tuple(unconverted), bytes_are_exponents=exponents)


def describe(linears: Sequence[Linear]) -> Fp8Blocks:
    """The description of an artifact, for engines."""
    number = next(linear.number for linear in linears if linear.number is not None)
    unconverted = [linear for linear in linears if linear.number is None]
    left = [_EXPERT.sub(".experts", linear.module) for linear in unconverted]
    # SGLang builds the multi-token-prediction layer under the name `decoder`
    left += [
        _EXPERT.sub(".experts", linear.module).replace(f"model.layers.{linear.layer}.", "model.decoder.")
        for linear in unconverted
        if linear.role == "mtp"
    ]
    return Fp8Blocks(number, tuple(dict.fromkeys((*left, "lm_head"))))


METHOD: Final = Method("fp8", (LAYOUT,), parse_config, describe, is_source=True)


def scales_of(tensors: Mapping[str, TensorEntry], description: Fp8Blocks | None) -> Mapping[str, TensorEntry]:
    """The scale of every FP8 weight, by the weight's name.

    Raises:
        CheckpointError: an FP8 weight has no scale, a scale has no FP8 weight, or their shapes do not fit.
    """
    weights = [name for name, entry in tensors.items() if entry.dtype == _WEIGHT_DTYPE]
    scales = {name.removesuffix(_SCALE): entry for name, entry in tensors.items() if name.endswith(_SCALE)}
    for name in sorted(set(weights) - set(scales)):
        raise _no_scale(name, tensors[name])
    for name in sorted(set(scales) - set(weights)):
        raise CheckpointError(
            "a scale belongs to no FP8 weight",
            where=str(scales[name].file),
            found=scales[name].name,
            fix="download the index and the shards of one release",
        )
    for name in weights:
        if description is None:
            raise _no_block_size(str(tensors[name].file), "no quantization_config")
        description.stored(name, tensors)
    return scales
