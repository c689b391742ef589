"""Reads the tensors of a checkpoint one at a time, each into its own memory.

It uses plain reads rather than a memory map, so that used tensors are freed and the resident size does not grow with
the checkpoint.
"""

import os
from dataclasses import replace

import torch
from torch import Tensor

from quantlab.checkpoint.header import TensorEntry
from quantlab.checkpoint.index import Checkpoint
from quantlab.errors import CheckpointError

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_LARGEST_READ = 1 << 30


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a non-empty CPU tensor; a view if the tensor is contiguous, else a copy."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_entry(entry: TensorEntry) -> Tensor:
    """Read the tensor of a header entry.

    Raises:
        CheckpointError: the file is missing or shorter than its header states.
    """
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
    buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
    view = bytes_of(buffer)
    try:
        descriptor = os.open(entry.file, os.O_RDONLY)
        try:
            position = 0
            while position < entry.nbytes:
                count = os.preadv(descriptor, [view[position : position + _LARGEST_READ]], entry.offset + position)
                if count == 0:
                    raise CheckpointError(
                        "a shard is truncated",
                        where=str(entry.file),
                        found=f"the bytes of {entry.name} end early",
                        fix="download the shard again",
                    )
                position += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(
            "a shard cannot be read",
            where=str(entry.file),
            found=error.strerror,
            fix="check the disk and the file's permissions",
        ) from error
    return buffer.view(TORCH_DTYPES[entry.dtype]).view(entry.shape)


class Reader:
    """Reads tensors of one checkpoint by name."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def read(self, name: str) -> Tensor:
        """Read the tensor `name`.

        Raises:
            CheckpointError: the checkpoint has no such tensor, or its bytes cannot be read.
        """
        entry = self.checkpoint.tensors.get(name)
        if entry is None:
            raise CheckpointError(
                "a tensor is missing",
                where=str(self.checkpoint.directory),
                found=f"no {name}",
                fix="download the complete checkpoint",
            )
        return read_entry(replace(entry, file=self.checkpoint.shards.path(entry.file.name)))
