"""The contract of a writer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from quantlab.exports.target import Progress
from quantlab.formats.contents import Contents
from quantlab.formats.stored import StoredWeights


@dataclass(frozen=True)
class Written:
    """What a writer tells about its files.

    Attributes:
        notes: what a user of the export must know, one sentence each: what was left out, what was changed.
        hashes: sha256 of the files hashed while they were written, by their names; the others are read once more for it.
        versions: of the libraries that wrote, by package.
    """

    notes: tuple[str, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


class Write(Protocol):
    """Writes an artifact in one format."""

    def __call__(self, artifact: StoredWeights, contents: Contents, directory: Path, progress: Progress) -> Written:
        """Write all files; holds one weight at a time (checkpoints may be larger than the memory).

        Args:
            artifact: reads the weights.
            contents: what the artifact contains; its format does not refuse it.
            directory: an empty directory.
            progress: called after each weight with its number of elements.

        Raises:
            ArtifactError: a file cannot be written, or a value cannot be expressed.
            CheckpointError: a weight cannot be read.
        """
