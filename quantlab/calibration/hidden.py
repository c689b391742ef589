"""Hidden states: the residual stream of every calibration token between two blocks.

One stream is [S, L, H]: S samples of L tokens, H wide. It lies on the device if there is room set aside for it, else in
memory while all streams of a workspace together stay under its cap; beyond the cap it is a memory map of an unlinked file,
which the system writes back when it needs the memory and which disappears with the process, however that ends.

A stream is read and replaced in place, some samples at a time. The number of samples is set by the workspace and does not
depend on free memory, because the order of summation, and so every number, depends on it.
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
"""Tokens a layer reads at once: enough for full speed, few enough that its intermediate activations stay small."""


class HiddenStates:
    """One stream [S, L, H]; made by `Workspace.stream`.

    Args:
        data: [S, L, H], on the device or on the CPU.
        device: where samples that are read arrive.
        tokens_at_once: tokens of one batch of `batches`, at least one sample.
        spilled: whether `data` lies in a file.
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
        """All samples in order, as (which, [B, L, H] on the device)."""
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
        """Single tokens [n, H] on the device, by their index in the stream [n] int64, counted over all samples."""
        return self._data.view(-1, self._data.shape[2]).index_select(0, index.to(self._data.device)).to(self.device)


class Workspace:
    """Allocates the streams of one run; the memory of a stream that is no longer referenced is free again.

    Args:
        directory: of the files, for streams that do not fit; must exist.
        memory_bytes: cap on the streams in memory, all together.
        device: the device that computes.
        tokens_at_once: see `HiddenStates`; the default suits the device.
        device_bytes: cap on the streams that lie on a device with memory of its own, all together. Routed experts read
            single tokens many times, which is slow across a bus.
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
            ArtifactError: it fits neither into the memory allowed nor onto the disk.
        """
        shape = (samples, length, width)
        needed = samples * length * width * dtype.itemsize
        place = next((place for place in ("device", "memory") if needed <= self._free[place]), "disk")
        if place == "disk":
            data = self._mapped(shape, needed, dtype)
        elif place == "device":
            data = torch.empty(shape, dtype=dtype, device=self.device)
        else:
            data = torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        stream = HiddenStates(data, device=self.device, tokens_at_once=self.tokens_at_once, spilled=place == "disk")
        if place != "disk":
            self._free[place] -= needed
            weakref.finalize(stream, self._give_back, place, needed)
        return stream

    def has_memory(self, nbytes: int) -> bool:
        """Whether streams of so many bytes in all fit into memory, however they are divided."""
        return nbytes <= max(self._free.values())

    def _give_back(self, place: str, nbytes: int) -> None:
        self._free[place] += nbytes

    def _mapped(self, shape: tuple[int, int, int], nbytes: int, dtype: torch.dtype) -> Tensor:
        try:
            descriptor, name = tempfile.mkstemp(prefix="hidden-", dir=self.directory)
            try:
                # a map of a file with holes would end the process by a signal when the disk is full
                os.posix_fallocate(descriptor, 0, nbytes)
                data = torch.from_file(name, shared=True, size=nbytes // dtype.itemsize, dtype=dtype)
            finally:
                os.close(descriptor)
                Path(name).unlink()
        except OSError as error:
            raise ArtifactError(
                "the hidden states of the calibration cannot be put on disk",
                where=str(self.directory),
                found=f"{error.strerror}; {nbytes / 1e9:.1f} GB needed",
                fix="free space, choose another --out, raise `memory` of the calibration, or use fewer samples",
            ) from error
        return data.view(shape)


_PREFIX: Final = "hidden-after-"


def _file(directory: Path, block: str) -> Path:
    return directory / f"{_PREFIX}{block.replace(' ', '-')}.safetensors"


def saved_streams(directory: Path) -> dict[str, Path]:
    """The files of `save_streams` in a directory, by the block that they were written after."""
    files = directory.glob(f"{_PREFIX}*.safetensors")
    return {path.stem.removeprefix(_PREFIX).replace("-", " "): path for path in files}


def save_streams(directory: Path, block: str, streams: Mapping[str, HiddenStates]) -> None:
    """Write the streams, which are those after `block`, whole or not at all.

    The files of other blocks stay until `discard_streams`, so that a journal can be written in between: at every moment the
    streams of the block that the journal names last exist.

    Raises:
        ArtifactError: the disk does not take the bytes.
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
    """Set the streams to what `save_streams` wrote after `block`.

    Raises:
        CheckpointError: the file is missing or damaged.
        ArtifactError: it holds streams of another shape.
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
    """Remove the files of every block but `keep`."""
    kept = None if keep is None else _file(directory, keep)
    for path in directory.glob(f"{_PREFIX}*"):
        if path != kept:
            path.unlink()
