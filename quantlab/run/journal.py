"""The journal of an unfinished artifact: one line per finished block, written when the block's shards are on disk.

The first line is the artifact's identity, so that work from another recipe, other code or another device is never
continued. An incomplete last line, left by a crash, is removed; its block is made again, with the same bytes.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantlab.errors import ArtifactError
from quantlab.passes.apply import WeightReport
from quantlab.run.identity import Identity


@dataclass(frozen=True)
class FileRecord:
    """A finished file: name, sha256 and size in bytes."""

    name: str
    sha256: str
    nbytes: int


@dataclass(frozen=True)
class FinishedBlock:
    """A block whose shards are on disk.

    Attributes:
        name: name of the block.
        files: its shards.
        reports: reports on the changed weights, by name.
        tokens_per_expert: calibration tokens routed to each expert; empty if routing was not recorded.
        kept_experts: old numbers of the routed experts that stay; empty if all stay.
    """

    name: str
    files: tuple[FileRecord, ...]
    reports: Mapping[str, WeightReport]
    tokens_per_expert: tuple[int, ...] = ()
    kept_experts: tuple[int, ...] = ()


def journal_identity(path: Path) -> dict[str, Any] | None:
    """The identity of the artifact a journal belongs to; None without a journal or a complete first line."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    if len(lines) < 2:
        return None
    identity: dict[str, Any] = json.loads(lines[0])
    return identity


class Journal:
    """The journal of one unfinished artifact.

    Args:
        path: the journal's file.
        directory: directory of the shards.
        identity: everything the artifact depends on.

    Raises:
        ArtifactError: the journal belongs to another artifact, or cannot be written.
    """

    def __init__(self, path: Path, directory: Path, *, identity: Identity) -> None:
        self.path = path
        self._blocks: dict[str, FinishedBlock] = {}
        lines = self._whole_lines()
        if lines:
            found = json.loads(lines[0])
            if (difference := identity.difference(found)) != "none":
                raise ArtifactError(
                    f"the output directory contains unfinished work of another {difference}",
                    where=str(directory),
                    found=identity.explain(found),
                    fix="choose another --out, or start over with --overwrite",
                )
            for line in lines[1:]:
                block = _parse(line)
                if all(
                    (directory / file.name).is_file() and (directory / file.name).stat().st_size == file.nbytes
                    for file in block.files
                ):
                    self._blocks[block.name] = block
        else:
            self._append(json.dumps(identity.written()))

    def has(self, block: str) -> bool:
        """Whether a block is finished."""
        return block in self._blocks

    def commit(self, block: FinishedBlock) -> None:
        """Record that a block is finished.

        Raises:
            ArtifactError: the line cannot be written.
        """
        self._append(json.dumps(asdict(block)))
        self._blocks[block.name] = block

    def finished(self, order: Sequence[str]) -> tuple[FinishedBlock, ...]:
        """The finished blocks in the given order."""
        return tuple(self._blocks[name] for name in order)

    def _whole_lines(self) -> list[str]:
        """The complete lines; an incomplete last line is removed from the file."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            os.truncate(self.path, len(whole))
        return whole.decode().splitlines()

    def _append(self, line: str) -> None:
        try:
            with self.path.open("ab") as file:
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ArtifactError(
                "the journal cannot be written",
                where=str(self.path),
                found=error.strerror,
                fix="free space or choose another --out, then run the same command again: finished work is kept",
            ) from error


def _parse(line: str) -> FinishedBlock:
    fields = json.loads(line)
    files = tuple(FileRecord(**file) for file in fields["files"])
    reports = {name: WeightReport(**report) for name, report in fields["reports"].items()}
    return FinishedBlock(
        fields["name"], files, reports, tuple(fields["tokens_per_expert"]), tuple(fields["kept_experts"])
    )
