"""Writes a finished artifact in another format.

The files are written into a directory beside the target, which is renamed at the end: an export is whole or absent. Its
`export.json` says what it was made from, so that `run` keeps it while artifact and code are the same.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quantlab.checkpoint.index import open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.errors import ArtifactError
from quantlab.exports.target import Progress
from quantlab.exports.targets import TARGETS
from quantlab.exports.writers.table import WRITERS
from quantlab.files import read_json, write_atomically, write_error
from quantlab.fingerprint import code_fingerprint
from quantlab.formats.contents import Contents
from quantlab.formats.read_contents import contents_of
from quantlab.formats.stored import StoredWeights
from quantlab.hardware import version_of
from quantlab.recipe.schemes import FormatName
from quantlab.version import VERSION

EXPORT_NAME: Final = "export.json"
_MANIFEST: Final = "manifest.json"


@dataclass(frozen=True)
class OpenArtifact:
    """A finished artifact.

    Attributes:
        directory: its path.
        key: its identity.
        manifest_sha256: of its manifest.
        stored: reads its weights.
        contents: what it contains.
    """

    directory: Path
    key: str
    manifest_sha256: str
    stored: StoredWeights
    contents: Contents


def open_artifact(directory: Path) -> OpenArtifact:
    """Open a finished artifact.

    Raises:
        ArtifactError: the directory is not an artifact of quantlab, or is incomplete.
        CheckpointError: its files cannot be read.
    """
    manifest = _manifest(directory)
    broken = _broken(directory, manifest["files"])
    if broken is not None:
        raise ArtifactError(
            "the artifact is incomplete",
            where=str(directory),
            found=broken,
            fix="make it again: `quantlab run` with --overwrite",
        )
    stored = StoredWeights(Reader(open_checkpoint(directory)))
    digest = hashlib.sha256((directory / _MANIFEST).read_bytes()).hexdigest()
    return OpenArtifact(directory, manifest["key"], digest, stored, contents_of(stored.reader.checkpoint))


def export(
    artifact_dir: Path, format: FormatName, out: Path, progress: Progress, *, overwrite: bool = False
) -> tuple[str, ...]:
    """Write a finished artifact in a format.

    Args:
        artifact_dir: a directory under runs/NAME/artifacts.
        format: the format.
        out: the directory to make.
        progress: called after each weight with its number of elements.
        overwrite: replace an earlier export at `out`.

    Returns:
        The notes of the writer.

    Raises:
        ArtifactError: it is not a finished artifact, the format cannot express it, `out` exists, or a file cannot be written.
        CheckpointError: a weight cannot be read.
    """
    artifact = open_artifact(artifact_dir)
    check_expressible(artifact, format)
    _check_free(out, overwrite=overwrite)
    temporary = out.with_name(f".{out.name}.unfinished")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
        temporary.mkdir(parents=True)
    except OSError as error:
        raise write_error(temporary, error) from error
    try:
        written = WRITERS[format](artifact.stored, artifact.contents, temporary, progress)
        files = {
            name: {"sha256": written.hashes.get(name) or _sha256(temporary / name), "bytes": size}
            for name, size in _sizes(temporary).items()
        }
        versions = {"quantlab": VERSION, **version_of("torch"), **written.versions}
        content = {
            "format": format,
            "artifact": os.path.relpath(artifact_dir, out),
            "artifact_key": artifact.key,
            "artifact_manifest_sha256": artifact.manifest_sha256,
            "code": _code(format),
            "files": files,
            "notes": list(written.notes),
            "versions": versions,
        }
        write_atomically(temporary / EXPORT_NAME, (json.dumps(content, indent=1) + "\n").encode())
        _publish(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return written.notes


def check_expressible(artifact: OpenArtifact, format: FormatName) -> None:
    """Check that a format can express an artifact.

    Raises:
        ArtifactError: it cannot.
    """
    reason = TARGETS[format].refuses(artifact.contents)
    if reason is not None:
        able = [name for name, target in TARGETS.items() if target.refuses(artifact.contents) is None]
        raise ArtifactError(
            f"the format {format} cannot express this artifact",
            where=str(artifact.directory),
            found=reason,
            fix=f"formats that can: {', '.join(able)}",
        )


def default_out(artifact_dir: Path, format: FormatName) -> Path:
    """The directory of an export if none is given: runs/NAME/exports/VARIANT.FORMAT.

    Raises:
        ArtifactError: the artifact is not in a directory called artifacts.
    """
    path = artifact_dir if artifact_dir.parent.name == "artifacts" else artifact_dir.resolve()
    if path.parent.name != "artifacts":
        raise ArtifactError(
            "the artifact is outside the directory of a run",
            where=str(artifact_dir),
            found=f"its folder is called {path.parent.name!r}",
            fix="say where the export goes: --out DIR",
        )
    return path.parent.parent / "exports" / f"{path.name}.{format}"


def is_current(artifact_dir: Path, format: FormatName, out: Path) -> bool:
    """Whether `out` is a whole export of an artifact, made from it by the current code.

    Raises:
        ArtifactError: the artifact's manifest is missing or damaged.
        CheckpointError: export.json is damaged.
    """
    if not (out / EXPORT_NAME).is_file():
        return False
    found, key = read_json(out / EXPORT_NAME), _manifest(artifact_dir)["key"]
    wanted = {"format": format, "artifact_key": key, "code": _code(format)}
    return all(found.get(name) == value for name, value in wanted.items()) and _broken(out, found["files"]) is None


def _code(format: FormatName) -> str:
    """Fingerprint of the code that writes a format."""
    return code_fingerprint((WRITERS[format].__module__,))


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / _MANIFEST
    if not path.is_file():
        raise ArtifactError(
            "the directory is not a quantlab artifact",
            where=str(directory),
            found="no such directory" if not directory.exists() else f"no {_MANIFEST}",
            fix="give a directory under runs/NAME/artifacts",
        )
    manifest = read_json(path)
    if not isinstance(manifest.get("files"), dict) or not isinstance(manifest.get("key"), str):
        raise ArtifactError(
            "the manifest is damaged",
            where=str(path),
            found=", ".join(manifest) or "nothing",
            fix="make the artifact again: `quantlab run` with --overwrite",
        )
    return manifest


def _broken(directory: Path, files: Mapping[str, Any]) -> str | None:
    """The first file that is missing or has another size, None if all are whole."""
    for name, recorded in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != recorded["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes, {recorded['bytes']:,} are recorded"
    return None


def _check_free(out: Path, *, overwrite: bool) -> None:
    """Raise an error if something is at `out` that must not be replaced."""
    if not out.exists():
        return
    ours = (out / EXPORT_NAME).is_file()
    if ours and overwrite:
        return
    raise ArtifactError(
        "the directory of the export exists",
        where=str(out),
        found="an earlier export" if ours else f"something that quantlab did not make: no {EXPORT_NAME}",
        fix="replace it with --overwrite, or choose another --out" if ours else "choose another --out",
    )


def _publish(temporary: Path, out: Path) -> None:
    """Rename the finished directory; an earlier export is moved away first and then deleted."""
    replaced = out.with_name(f".{out.name}.replaced")
    try:
        if out.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            out.replace(replaced)
        temporary.replace(out)
    except OSError as error:
        raise write_error(out, error) from error
    shutil.rmtree(replaced, ignore_errors=True)


def _sizes(directory: Path) -> dict[str, int]:
    """The bytes of every file by its relative path."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
