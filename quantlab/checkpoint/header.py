"""The header of a safetensors file, read and validated without reading a tensor.

A safetensors file is eight bytes (the header's length, little endian), the header (JSON: tensor name -> dtype, shape and
byte range) and the bytes of the tensors, contiguous and without overlap. The header is untrusted input: every field is
checked before an offset is used.
Source: the format's description in the safetensors documentation.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.errors import CheckpointError

DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
PREFIX_BYTES = 8
"""Bytes before the header, which hold its length."""
_LONGEST_HEADER = 100_000_000
_POINTER = b"version "
"""The first bytes of a Git LFS pointer, which stands for a file that was not downloaded."""


@dataclass(frozen=True)
class TensorEntry:
    """Location of a tensor.

    Attributes:
        name: the tensor's name.
        dtype: dtype word of the safetensors format, for example "BF16" or "F8_E4M3".
        shape: its dimensions.
        file: the file that contains it.
        offset: its first byte, from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * DTYPE_BITS[self.dtype] // 8


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file, in the order of their bytes.

    Raises:
        CheckpointError: the file is missing or is not a well-formed safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(PREFIX_BYTES)
            begin += file.read(header_length(path, begin, size=size))
    except OSError as error:
        raise CheckpointError(
            "a shard cannot be read", where=str(path), found=error.strerror, fix="download the shard again"
        ) from error
    return parse_header(path, begin, size=size)


def header_length(path: Path, begin: bytes, *, size: int) -> int:
    """The length of a file's header in bytes, which follows the prefix.

    Args:
        path: of the file, for messages and entries; it need not exist.
        begin: its first bytes, at least the prefix.
        size: of the whole file, in bytes.

    Raises:
        CheckpointError: the file cannot have such a header.
    """
    prefix = begin[:PREFIX_BYTES]
    length = int.from_bytes(prefix, "little")
    if prefix == _POINTER:
        raise _damaged(path, "it is a pointer of Git LFS", f"{size} bytes, which only name the file")
    if len(prefix) < PREFIX_BYTES or length > size - PREFIX_BYTES or length > _LONGEST_HEADER:
        raise _damaged(
            path, "its header is longer than the file", f"a header of {length} bytes in a file of {size} bytes"
        )
    return length


def parse_header(path: Path, begin: bytes, *, size: int) -> dict[str, TensorEntry]:
    """The tensors of one file from its first bytes: prefix and header.

    Args:
        path: of the file, for messages and entries; it need not exist.
        begin: at least prefix and header.
        size: of the whole file, in bytes.

    Raises:
        CheckpointError: the bytes do not begin a well-formed safetensors file.
    """
    data_start = PREFIX_BYTES + header_length(path, begin, size=size)
    try:
        content = json.loads(begin[PREFIX_BYTES:data_start])
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is not JSON", str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, "its header is not a JSON object", type(content).__name__)
    content.pop("__metadata__", None)
    entries = [_entry(path, name, fields, data_start=data_start) for name, fields in content.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_layout(path, entries, data_start=data_start, size=size)
    return {entry.name: entry for entry in entries}


def _entry(path: Path, name: str, fields: dict[str, Any], *, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        integers = all(isinstance(number, int) and number >= 0 for number in (*shape, start, end))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the entry of {name} is malformed", repr(fields)[:200]) from error
    if not integers:
        raise _damaged(path, f"the entry of {name} is malformed", repr(fields)[:200])
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(
            "a tensor has an unknown dtype",
            where=f"{path}, {name}",
            found=repr(dtype),
            fix="known: " + ", ".join(DTYPE_BITS),
        )
    entry = TensorEntry(name, dtype, shape, path, data_start + start)
    if entry.nbytes != end - start:
        raise _damaged(
            path, f"the byte range of {name} does not fit its shape", f"{dtype} {list(shape)} in {end - start} bytes"
        )
    return entry


def _check_layout(path: Path, entries: list[TensorEntry], *, data_start: int, size: int) -> None:
    position = data_start
    for entry in entries:
        if entry.offset != position:
            problem = "overlaps the tensor before it" if entry.offset < position else "leaves a gap before it"
            raise _damaged(path, f"{entry.name} {problem}", f"starts at byte {entry.offset}, expected {position}")
        position += entry.nbytes
    if position > size:
        raise CheckpointError(
            "a shard is truncated",
            where=str(path),
            found=f"{size} bytes, the header describes {position}",
            fix="download the shard again",
        )
    if position < size:
        raise _damaged(path, "bytes follow the last tensor", f"{size - position} bytes too many")


def _damaged(path: Path, what: str, found: str) -> CheckpointError:
    return CheckpointError(f"a shard is damaged: {what}", where=str(path), found=found, fix="download the shard again")


def bytes_of(entry: TensorEntry) -> bytes:
    """The bytes of a tensor that describes others, a few at most.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with entry.file.open("rb") as opened:
            opened.seek(entry.offset)
            return opened.read(entry.nbytes)
    except OSError as error:
        raise CheckpointError(
            "a tensor cannot be read",
            where=f"{entry.file}, {entry.name}",
            found=str(error.strerror),
            fix="copy the file again",
        ) from error
