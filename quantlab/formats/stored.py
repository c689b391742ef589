"""Reads the weights of any supported checkpoint, independent of its layout."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.checkpoint.reader import TORCH_DTYPES, Reader
from quantlab.errors import CheckpointError
from quantlab.formats.codecs.table import CODECS
from quantlab.formats.layout import Stored
from quantlab.formats.layouts import description_of, logical_names, method_of
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.number_format import NumberFormat


@dataclass(frozen=True)
class Content:
    """Format and size of one weight of a checkpoint.

    Attributes:
        name: its logical name.
        numbers: name of the number format, or the dtype word of a weight that is not quantized.
        description: readable description of the format; empty for floating point.
        parameters: number of weights.
        nbytes: bytes of all its tensors.
    """

    name: str
    numbers: str
    description: str
    parameters: int
    nbytes: int


class StoredWeights:
    """Tensors by their logical names (``….weight``), decoded one at a time.

    Args:
        reader: reads the checkpoint's files.
        device: tensors are copied there in their stored form and decoded there.

    Attributes:
        description: the checkpoint's description of its quantized weights, None if it is not quantized.

    Raises:
        ArtifactError: the checkpoint's numbers are of a kind quantlab does not read.
        CheckpointError: the checkpoint is quantized in a way quantlab does not read.
    """

    def __init__(self, reader: Reader, *, device: torch.device | None = None) -> None:
        self.reader = reader
        self.device = torch.device("cpu") if device is None else device
        self._tensors = reader.checkpoint.tensors
        self.description = description_of(reader.checkpoint)

    def names(self) -> Iterator[str]:
        """Logical names, see `logical_names`."""
        return logical_names(self._tensors)

    def stored(self, name: str) -> Stored | None:
        """How the weight `name` is stored, None if it is not quantized.

        Raises:
            ArtifactError, CheckpointError: the checkpoint's description contradicts its tensors.
        """
        if self.description is None or not name.endswith(".weight"):
            return None
        return self.description.stored(name, self._tensors)

    def format_of(self, name: str) -> NumberFormat | None:
        """The number format of the weight `name`, None if it is not quantized.

        Raises:
            ArtifactError, CheckpointError: as `stored`.
        """
        stored = self.stored(name)
        return None if stored is None else stored.number

    def elements(self, name: str) -> int:
        """Number of elements of the weight `name`; transformers stores matrices without any for zero shared experts."""
        stored = self.stored(name)
        return self._tensors[name].elements if stored is None else stored.elements

    def scale_dtype_of(self, name: str) -> torch.dtype:
        """The dtype of the scales of the quantized weight `name`."""
        stored = self.stored(name)
        assert stored is not None, f"{name} is quantized"
        return TORCH_DTYPES[stored.scale.dtype]

    @property
    def method(self) -> str:
        """The checkpoint's `quant_method`, or "not quantized"."""
        method = method_of(self.reader.checkpoint)
        return "not quantized" if method is None else method.word

    def contents(self) -> Iterator[Content]:
        """Format and size of every weight, from headers alone."""
        for name in self.names():
            stored = self.stored(name)
            if stored is None:
                entry = self._tensors[name]
                yield Content(name, entry.dtype, "", entry.elements, entry.nbytes)
            else:
                nbytes = sum(part.nbytes for part in stored.parts)
                yield Content(name, stored.number.name, stored.number.description, stored.elements, nbytes)

    def held_bytes(self, name: str, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes of the weight `name` in memory (integers stay packed, others are of `dtype`), and its elements."""
        stored = self.stored(name)
        if stored is not None and stored.number.is_integer:
            return stored.numbers.nbytes + stored.scale.nbytes, stored.elements
        elements = self.elements(name)
        return elements * dtype.itemsize, elements

    def read(self, name: str) -> Tensor | QuantizedMatrix:
        """Read the weight `name`: integers stay quantized, FP8 blocks become bfloat16, other dtypes are unchanged.

        Raises:
            ArtifactError: its tensors contradict each other, or have a format that quantlab does not read.
            CheckpointError: the tensor or a part of it is missing, or its parts do not fit.
        """
        stored = self.stored(name)
        if stored is None:
            tensor = self._read(name)
            if tensor.dtype == torch.float8_e4m3fn:
                raise CheckpointError(
                    "an FP8 weight is not described",
                    where=f"{self.reader.checkpoint.directory}, {name}",
                    found="no quantization_config with a block size",
                    fix="use the config.json of the original release",
                )
            return tensor
        matrix = self.read_quantized(name)
        return matrix if stored.number.is_integer else matrix.dequantize(torch.bfloat16)

    def read_quantized(self, name: str) -> QuantizedMatrix:
        """The quantized weight `name` as it is stored, FP8 too.

        Raises:
            ArtifactError, CheckpointError: as `read`.
        """
        stored = self.stored(name)
        assert stored is not None, f"{name} is quantized"
        parts = {part.name: self._read(part.name) for part in stored.parts}
        return CODECS[stored.layout].decode(name, parts, stored.number)

    def read_dense(self, name: str, dtype: torch.dtype) -> Tensor:
        """The weight `name` in floating point, independent of its layout; the reference for packed computations."""
        weight = self.read(name)
        return weight.dequantize(dtype) if isinstance(weight, QuantizedMatrix) else weight.to(dtype)

    def _read(self, name: str) -> Tensor:
        return self.reader.read(name).to(self.device)
