"""The weights of any checkpoint quantlab reads, whatever their encoding: plain, FP8 blocks or compressed-tensors."""

from collections.abc import Iterator

import torch
from torch import Tensor

from quantlab.checkpoint.index import FP8_SCALE_SUFFIX
from quantlab.checkpoint.reader import Reader
from quantlab.errors import CheckpointError
from quantlab.formats.compressed_tensors import QUANT_METHOD, decode, parse_config
from quantlab.numerics.fp8 import block_grid, dequantize_blocks
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.recipe.schemes import Scheme

_PARTS = (".weight_packed", ".weight_scale", ".weight_shape", ".weight" + FP8_SCALE_SUFFIX)


class StoredWeights:
    """Tensors by their logical names (``….weight``), decoded one at a time.

    Attributes:
        quantization: the artifact's quantization, None for plain and FP8 checkpoints.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        config = reader.checkpoint.config
        described = config.get("quantization_config") or {}
        self._block = reader.checkpoint.fp8_block
        where = str(reader.checkpoint.directory / "config.json")
        self.quantization = (
            parse_config(described, where=where) if described.get("quant_method") == QUANT_METHOD else None
        )
        if described and self._block is None and self.quantization is None:
            raise CheckpointError(
                "the checkpoint is quantized in a way quantlab does not read",
                where=where,
                found=str(described.get("quant_method")),
                fix="use the original checkpoint; readable are plain, fp8 (blocks) and compressed-tensors",
            )

    def names(self) -> Iterator[str]:
        """Logical names: every tensor, with the parts of an encoded weight counted as that weight."""
        for name in self.reader.checkpoint.tensors:
            if name.endswith(".weight_packed"):
                yield name.removesuffix("_packed")
            elif not name.endswith(_PARTS):
                yield name

    def scheme_of(self, name: str) -> Scheme | None:
        """The integer scheme of the weight `name`, None if it is stored as floating point."""
        if self.quantization is None or not name.endswith(".weight"):
            return None
        if name.removesuffix("weight") + "weight_scale" not in self.reader:
            return None
        return self.quantization.scheme_of(name.removesuffix(".weight"))

    def read(self, name: str) -> Tensor | QuantizedMatrix:
        """The weight `name`: integers stay integers, FP8 blocks become bfloat16, everything else comes as stored.

        Raises:
            CheckpointError: the tensor or a part of it is missing, or its parts do not fit.
        """
        scheme = self.scheme_of(name)
        if scheme is not None:
            return decode(name, self.reader.read, scheme)
        stored = self.reader.read(name)
        if stored.dtype != torch.float8_e4m3fn:
            return stored
        if self._block is None or name + FP8_SCALE_SUFFIX not in self.reader:
            raise CheckpointError(
                "an FP8 weight has no scale",
                where=str(self.reader.checkpoint.directory),
                found=f"no {name}{FP8_SCALE_SUFFIX}",
                fix="download the complete checkpoint",
            )
        scale_inv = self.reader.read(name + FP8_SCALE_SUFFIX)
        rows, columns = stored.shape
        if tuple(scale_inv.shape) != block_grid((rows, columns), self._block):
            raise CheckpointError(
                "a scale does not fit its weight",
                where=name + FP8_SCALE_SUFFIX,
                found=f"{list(scale_inv.shape)} for a weight of {[rows, columns]} in blocks of {list(self._block)}",
                fix="download the shard again",
            )
        return dequantize_blocks(stored, scale_inv, block=self._block, dtype=torch.bfloat16)

    def read_dense(self, name: str, dtype: torch.dtype) -> Tensor:
        """The weight `name` as floating point, whatever its encoding: the reference every packed computation is held to."""
        weight = self.read(name)
        return weight.dequantize(dtype) if isinstance(weight, QuantizedMatrix) else weight.to(dtype)
