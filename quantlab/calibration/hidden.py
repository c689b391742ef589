"""Hidden states: the residual stream of every calibration token between two blocks.

A stream is [S, L, H]: S samples of L tokens of width H. It is allocated on the device if it fits the device's budget,
else in host memory while all streams of a workspace stay under its cap, else in a memory map of an unlinked file: the
system writes it back under memory pressure and removes it when the process ends.

A stream is read and overwritten in batches of samples. The workspace fixes the batch size independently of free memory,
because it determines the order of summation and thereby the last bits of every result.
"""

import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from quantlab.checkpoint.header import read_header
from quantlab.checkpoint.reader import DTYPE_NAMES, bytes_of
from quantlab.checkpoint.writer import shard_header
from quantlab.errors import ArtifactError
from quantlab.files import write_error

_TOKENS_AT_ONCE: Final[Mapping[str, int]] = {"cpu": 4096, "cuda": 32768}
"""Tokens per batch: enough for full speed, few enough to keep intermediate activations small."""


class HiddenStates:
    """One stream [S, L, H]; made by `Workspace.stream`.

    Args:
        data: [S, L, H], on the device or on the CPU.
        device: device of the samples returned by `read`.
        tokens_at_once: tokens per batch of `batches`, at least one sample.
        spilled: whether `data` is mapped from a file.
    """

    def __init__(self, data: Tensor, *, device: torch.device, tokens_at_once: int, spilled: bool) -> None:
        self._data, self.device, self.tokens_at_once, self.spilled = data, device, tokens_at_once, spilled

    @property
    def shape(self) -> tuple[int, int, int]:
        """Samples S, tokens of a sample L, width H."""
        samples, length, width = self._data.shape
        return samples, length, width

    @property
    def tokens(self) -> int:
        """S · L."""
        return self._data.shape[0] * self._data.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self._data.dtype

    def batches(self) -> Iterator[tuple[slice, Tensor]]:
        """All samples in order, as pairs of a slice of samples and their hidden states [B, L, H] on the device."""
        samples, length, _ = self.shape
        step = max(self.tokens_at_once // length, 1)
        for start in range(0, samples, step):
            which = slice(start, min(start + step, samples))
            yield which, self.read(which)

    def read(self, samples: slice) -> Tensor:
        """Some samples [B, L, H] on the device; read-only."""
        return self._data[samples].to(self.device, non_blocking=True)

    def write(self, samples: slice, values: Tensor) -> None:
        """Replace some samples by [B, L, H]."""
        self._data[samples].copy_(values)

    def rows(self, index: Tensor) -> Tensor:
        """Single tokens [n, H] on the device, by their index [n] int64 over all samples."""
        return self._data.view(-1, self._data.shape[2]).index_select(0, index.to(self._data.device)).to(self.device)


class Workspace:
    """Allocates the streams of one run; a stream that is no longer referenced returns its memory to the budget.

    Args:
        directory: existing directory for the files of streams that do not fit into memory.
        memory_bytes: cap on the total size of the streams in host memory.
        device: the device of the computation.
        tokens_at_once: see `HiddenStates`; the default depends on the device.
        device_bytes: cap on the total size of the streams in GPU memory. Routed experts read single tokens many times,
            which is slow over PCIe.
    """

    def __init__(
        self,
        directory: Path,
        *,
        memory_bytes: int,
        device: torch.device,
        tokens_at_once: int | None = None,
        device_bytes: int = 0,
    ) -> None:
        self.directory, self.device = directory, device
        self._free = {"memory": memory_bytes, "device": 0 if device.type == "cpu" else device_bytes}
        self.tokens_at_once = tokens_at_once or _TOKENS_AT_ONCE.get(device.type, _TOKENS_AT_ONCE["cpu"])

    def stream(self, samples: int, length: int, width: int, *, dtype: torch.dtype) -> HiddenStates:
        """A stream [samples, length, width] of undefined values.

        Raises:
            ArtifactError: it fits neither into the memory budget nor onto the disk.
        """
        shape = (samples, length, width)
        needed = samples * length * width * dtype.itemsize
        location = next((location for location in ("device", "memory") if needed <= self._free[location]), "disk")
        if location == "disk":
            data = self._mapped(shape, needed, dtype)
        elif location == "device":
            data = torch.empty(shape, dtype=dtype, device=self.device)
        else:
            data = torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        stream = HiddenStates(data, device=self.device, tokens_at_once=self.tokens_at_once, spilled=location == "disk")
        if location != "disk":
            self._free[location] -= needed
            weakref.finalize(stream, self._release, location, needed)
        return stream

    def has_memory(self, nbytes: int) -> bool:
        """Whether streams of `nbytes` in total fit into memory, however they are divided."""
        return nbytes <= max(self._free.values())

    def _release(self, location: str, nbytes: int) -> None:
        self._free[location] += nbytes

    def _mapped(self, shape: tuple[int, int, int], nbytes: int, dtype: torch.dtype) -> Tensor:
        try:
            descriptor, name = tempfile.mkstemp(prefix="hidden-", dir=self.directory)
            try:
                # writing to a map of a sparse file would kill the process with SIGBUS when the disk is full
                os.posix_fallocate(descriptor, 0, nbytes)
                data = torch.from_file(name, shared=True, size=nbytes // dtype.itemsize, dtype=dtype)
            finally:
                os.close(descriptor)
                Path(name).unlink()
        except OSError as error:
            raise ArtifactError(
                "the hidden states of the calibration cannot be written to disk",
                where=str(self.directory),
                found=f"{error.strerror}; {nbytes / 1e9:.1f} GB needed",
                fix="free space, choose another --out, raise `memory` of the calibration, or use fewer samples",
            ) from error
        return data.view(shape)


_PREFIX: Final = "hidden-after-"


def _file(directory: Path, block: str) -> Path:
    return directory / f"{_PREFIX}{block.replace(' ', '-')}.safetensors"


def saved_streams(directory: Path) -> dict[str, Path]:
    """The files of `save_streams` in a directory, by the name of the block after which they were written."""
    files = directory.glob(f"{_PREFIX}*.safetensors")
    return {path.stem.removeprefix(_PREFIX).replace("-", " "): path for path in files}


def save_streams(directory: Path, block: str, streams: Mapping[str, HiddenStates]) -> None:
    """Write the streams after `block` atomically.

    The files of other blocks are kept until `discard_streams`, so that the journal can be written in between: the
    streams after the last block of the journal exist at any moment.

    Raises:
        ArtifactError: the file cannot be written.
    """
    path = _file(directory, block)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb", buffering=0) as file:
            file.write(shard_header((name, DTYPE_NAMES[s.dtype], s.shape) for name, s in streams.items()))
            for stream in streams.values():
                for sample in range(stream.shape[0]):
                    data = bytes_of(stream.read(slice(sample, sample + 1)).cpu())
                    while data:
                        data = data[file.write(data) or 0 :]
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_error(path, error) from error


def load_streams(directory: Path, block: str, streams: Mapping[str, HiddenStates]) -> None:
    """Load the streams that `save_streams` wrote after `block`.

    Raises:
        CheckpointError: the file is missing or damaged.
        ArtifactError: its streams have another shape or dtype.
    """
    path = _file(directory, block)
    header = read_header(path)
    found = {name: (entry.dtype, entry.shape) for name, entry in header.items()}
    wanted = {name: (DTYPE_NAMES[stream.dtype], stream.shape) for name, stream in streams.items()}
    if found != wanted:
        raise ArtifactError(
            "saved hidden states belong to another calibration",
            where=str(path),
            found=f"{found}, expected {wanted}",
            fix="start again with --overwrite",
        )
    with path.open("rb") as file:
        for name, stream in streams.items():
            file.seek(header[name].offset)
            sample = torch.empty(1, *stream.shape[1:], dtype=stream.dtype)
            for index in range(stream.shape[0]):
                file.readinto(bytes_of(sample))
                stream.write(slice(index, index + 1), sample)


def discard_streams(directory: Path, *, keep: str | None) -> None:
    """Remove the files of every block except `keep`."""
    kept = None if keep is None else _file(directory, keep)
    for path in directory.glob(f"{_PREFIX}*"):
        if path != kept:
            path.unlink()
