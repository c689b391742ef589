"""The weights of any checkpoint quantlab reads, whatever their encoding: plain, FP8 blocks, compressed-tensors or GPTQ."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quantlab.checkpoint.header import TensorEntry
from quantlab.checkpoint.index import FP8_SCALE_SUFFIX, Checkpoint
from quantlab.checkpoint.reader import TORCH_DTYPES, Reader
from quantlab.errors import CheckpointError
from quantlab.files import read_json
from quantlab.formats import compressed_tensors, gptq
from quantlab.numerics.fp8 import block_grid, dequantize_blocks
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.recipe.schemes import Scheme

_INTEGERS: Final = ("weight_packed", "qweight", "weight")
"""The part of a quantized weight that stands for the whole; the first there is."""
_PARTS: Final = tuple(dict.fromkeys((*compressed_tensors.PARTS, *gptq.PARTS)))
_OTHER_PARTS: Final = tuple(f".{part}" for part in (*_PARTS, "weight" + FP8_SCALE_SUFFIX) if part not in _INTEGERS)


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds of one weight.

    Attributes:
        name: its logical name.
        numbers: name of the scheme, or the dtype word of a weight that is floating point.
        description: of the scheme for people; empty for floating point.
        parameters: weights it stands for.
        nbytes: of all its parts.
    """

    name: str
    numbers: str
    description: str
    parameters: int
    nbytes: int


class StoredWeights:
    """Tensors by their logical names (``….weight``), decoded one at a time.

    Args:
        reader: of the checkpoint's files.
        device: tensors are brought there as they are stored, and decoded there.

    Attributes:
        quantization: what the checkpoint says of its integers, None for plain and FP8 checkpoints.

    Raises:
        ArtifactError: the checkpoint's integers are of a kind quantlab does not read.
        CheckpointError: the checkpoint is quantized in a way quantlab does not read.
    """

    def __init__(self, reader: Reader, *, device: torch.device | None = None) -> None:
        self.reader = reader
        self.device = torch.device("cpu") if device is None else device
        self._tensors = reader.checkpoint.tensors
        self._block = reader.checkpoint.fp8_block
        self.quantization = quantization_of(reader.checkpoint)

    def names(self) -> Iterator[str]:
        """Logical names: every tensor, with the parts of an encoded weight counted as that weight."""
        for name in self._tensors:
            prefix, _, part = name.rpartition(".")
            if part in _INTEGERS:
                yield f"{prefix}.weight"
            elif not name.endswith(_OTHER_PARTS):
                yield name

    def scheme_of(self, name: str) -> Scheme | None:
        """The integer scheme of the weight `name`, None if it is stored as floating point.

        Raises:
            ArtifactError: what the checkpoint says and what its tensors are disagree.
        """
        if self.quantization is None or not name.endswith(".weight"):
            return None
        return self.quantization.scheme_stored(name, self._tensors)

    def scale_dtype_of(self, name: str) -> torch.dtype:
        """The dtype of the scales of the quantized weight `name`."""
        return TORCH_DTYPES[self._scales(name).dtype]

    @property
    def method(self) -> str:
        """How the checkpoint is quantized: the word of its description."""
        match self.quantization:
            case compressed_tensors.QuantizationConfig():
                return compressed_tensors.QUANT_METHOD
            case gptq.GptqConfig():
                return gptq.QUANT_METHOD
        return "fp8" if self._block else "not quantized"

    def contents(self) -> Iterator[Content]:
        """What there is of every weight, from headers alone."""
        for name in self.names():
            scheme, prefix = self.scheme_of(name), name.removesuffix("weight")
            parts = (prefix + part for part in _PARTS) if scheme else (name, name + FP8_SCALE_SUFFIX)
            nbytes = sum(self._tensors[part].nbytes for part in parts if part in self._tensors)
            _, parameters = self.held_bytes(name, torch.float16)
            numbers, description = (scheme.name, scheme.description) if scheme else (self._tensors[name].dtype, "")
            yield Content(name, numbers, description, parameters, nbytes)

    def held_bytes(self, name: str, dtype: torch.dtype) -> tuple[int, int]:
        """What the weight `name` takes where integers stay packed and all else is of `dtype`, in bytes; its elements."""
        scheme = self.scheme_of(name)
        if scheme is None:
            elements = self._tensors[name].elements
            return elements * dtype.itemsize, elements
        prefix = name.removesuffix("weight")
        integers = next(self._tensors[prefix + part] for part in _INTEGERS if prefix + part in self._tensors)
        return integers.nbytes + self._scales(name).nbytes, integers.nbytes * 8 // scheme.bits

    def read(self, name: str) -> Tensor | QuantizedMatrix:
        """The weight `name`: integers stay integers, FP8 blocks become bfloat16, everything else comes as stored.

        Raises:
            ArtifactError: its parts do not fit each other, or hold numbers quantlab does not read.
            CheckpointError: the tensor or a part of it is missing, or its parts do not fit.
        """
        scheme = self.scheme_of(name)
        if scheme is not None:
            assert self.quantization is not None, "what has a scheme is described"
            prefix = name.removesuffix("weight")
            parts = (prefix + part for part in _PARTS)
            return self.quantization.decode(
                name, {part: self._read(part) for part in parts if part in self.reader}, scheme
            )
        stored = self._read(name)
        if stored.dtype != torch.float8_e4m3fn:
            return stored
        if self._block is None or name + FP8_SCALE_SUFFIX not in self.reader:
            raise CheckpointError(
                "an FP8 weight has no scale",
                where=str(self.reader.checkpoint.directory),
                found=f"no {name}{FP8_SCALE_SUFFIX}",
                fix="download the complete checkpoint",
            )
        scale_inv = self._read(name + FP8_SCALE_SUFFIX)
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

    def _read(self, name: str) -> Tensor:
        return self.reader.read(name).to(self.device)

    def _scales(self, name: str) -> TensorEntry:
        prefix = name.removesuffix("weight")
        return self._tensors.get(prefix + "weight_scale") or self._tensors[prefix + "scales"]


def quantization_of(checkpoint: Checkpoint) -> compressed_tensors.QuantizationConfig | gptq.GptqConfig | None:
    """What a checkpoint says of its integers, None for plain and FP8 checkpoints.

    Raises:
        ArtifactError: they are of a kind quantlab does not read.
        CheckpointError: the checkpoint is quantized in a way quantlab does not read.
    """
    where = checkpoint.directory / "config.json"
    described = checkpoint.config.get("quantization_config") or {}
    if not described and (checkpoint.directory / gptq.CONFIG_NAME).is_file():
        where = checkpoint.directory / gptq.CONFIG_NAME
        described = {"quant_method": gptq.QUANT_METHOD} | read_json(where)
    match described.get("quant_method"):
        case compressed_tensors.QUANT_METHOD:
            return compressed_tensors.parse_config(described, where=str(where))
        case gptq.QUANT_METHOD:
            return gptq.parse_config(described, where=str(where))
        case method if described and checkpoint.fp8_block is None:
            raise CheckpointError(
                "the checkpoint is quantized in a way quantlab does not read",
                where=str(where),
                found=str(method),
                fix="use the original checkpoint; readable are plain, fp8 (blocks), compressed-tensors and gptq",
            )
    packed = next((name for name in checkpoint.tensors if name.endswith((".weight_packed", ".qweight"))), None)
    if packed is not None:
        raise CheckpointError(
            "the checkpoint holds packed integers and does not say of what kind",
            where=str(where),
            found=f"no quantization_config, and {packed}",
            fix="use the config.json (or quantize_config.json) of the same release",
        )
    return None
