"""Writes safetensors as a stream: the header first, then each tensor as soon as it is computed.

The plan has the name, dtype and shape of every tensor of a shard, so the header is written before any weight is read,
and only one tensor is in memory at a time. A shard is written under a temporary name and renamed when it is completely
on disk.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from quantlab.checkpoint.header import DTYPE_BITS
from quantlab.checkpoint.reader import DTYPE_NAMES, bytes_of
from quantlab.files import write_error


def shard_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The bytes of a safetensors file before its first tensor.

    Args:
        tensors: name, dtype word and shape of each tensor, in file order.
    """
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in tensors:
        elements = 1
        for size in shape:
            elements *= size
        end = position + elements * DTYPE_BITS[dtype] // 8
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """Writes one shard; use it as a context manager.

    On exit the file is synced and renamed; after an exception it is removed.
    """

    def __init__(self, path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
        self.path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._expected = list(tensors)
        self._position = 0
        self._digest = hashlib.sha256()
        self.nbytes = 0

    @property
    def sha256(self) -> str:
        """sha256 of the bytes written so far."""
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        try:
            self._file = self._temporary.open("wb", buffering=0)
        except OSError as error:
            raise write_error(self._temporary, error) from error
        self._write(memoryview(shard_header(self._expected)))
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor, in the order of the header.

        Raises:
            ArtifactError: the file cannot be written.
        """
        announced = self._expected[self._position]
        assert announced == (name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)), (
            f"{announced} announced, {name} {tensor.dtype} {tuple(tensor.shape)} written"
        )
        self._position += 1
        if tensor.numel():
            self._write(bytes_of(tensor))

    def _write(self, data: memoryview) -> None:
        self._digest.update(data)
        self.nbytes += len(data)
        try:
            while data:
                data = data[self._file.write(data) or 0 :]
        except OSError as error:
            self._discard()
            raise write_error(self.path, error) from error

    def _discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        assert self._position == len(self._expected), (
            f"{self.path.name}: {self._position} of {len(self._expected)} tensors written"
        )
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            self._temporary.replace(self.path)
        except OSError as problem:
            self._discard()
            raise write_error(self.path, problem) from problem
