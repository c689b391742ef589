"""The safetensors files of a checkpoint, wherever they are: in its directory, or still on a hub (`quantlab.checkpoint.hub`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quantlab.checkpoint.header import TensorEntry, read_header


class Shards(Protocol):
    """The files with the weights of one checkpoint."""

    @property
    def directory(self) -> Path:
        """Where the other files of the checkpoint are."""

    @property
    def commit(self) -> str | None:
        """The commit of a hub that the files are of; None for a directory."""

    def names(self) -> frozenset[str]:
        """The names of all safetensors files."""

    def header(self, name: str) -> dict[str, TensorEntry]:
        """The tensors of a file.

        Raises:
            CheckpointError: its header cannot be read, or is damaged.
        """

    def is_here(self, name: str) -> bool:
        """Whether a file can be read without fetching it."""

    def path(self, name: str) -> Path:
        """Where a file can be read until the next call, fetched if it is not here.

        Raises:
            CheckpointError: it cannot be fetched.
        """


@dataclass(frozen=True)
class LocalShards:
    """The safetensors files of a directory."""

    directory: Path
    commit: None = None

    def names(self) -> frozenset[str]:
        return frozenset(path.name for path in self.directory.glob("*.safetensors") if path.is_file())

    def header(self, name: str) -> dict[str, TensorEntry]:
        return read_header(self.directory / name)

    def is_here(self, name: str) -> bool:
        return True

    def path(self, name: str) -> Path:
        return self.directory / name
