"""What is judged: an artifact, or an export of it whose reference is the artifact; and the source model it was made from."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quantlab.checkpoint.hub import cached_snapshot
from quantlab.checkpoint.index import open_checkpoint
from quantlab.errors import ArtifactError, CheckpointError, EvaluationError
from quantlab.evaluation.engines.verdict import manifest_sha256
from quantlab.evaluation.manifest import read_manifest
from quantlab.files import read_json
from quantlab.formats.layouts import method_of
from quantlab.shipped import names

EXPORT_NAME: Final = "export.json"


@dataclass(frozen=True)
class Judged:
    """Files that engines load.

    Attributes:
        directory: of the files.
        artifact: the artifact whose weights they are: the reference.
        format: their format: "compressed-tensors", "fp8", "dense", or that of the export.
        export_sha256: hash of export.json; empty for an artifact.
    """

    directory: Path
    artifact: Path
    format: str
    export_sha256: str = ""


def judged_of(directory: Path) -> Judged:
    """What a directory holds, for engines.

    Raises:
        ArtifactError: it is neither an artifact nor an export, or the artifact of an export is not there or was changed.
    """
    path = directory / EXPORT_NAME
    if not path.is_file():
        if not (directory / "manifest.json").is_file():
            raise ArtifactError(
                "the directory is neither an artifact nor an export",
                where=str(directory),
                found=f"no manifest.json and no {EXPORT_NAME}",
                fix="give a directory under runs/NAME/artifacts or runs/NAME/exports",
            )
        method = method_of(open_checkpoint(directory))
        return Judged(directory, directory, "dense" if method is None else method.word)
    export = read_json(path)
    artifact = (directory / str(export.get("artifact", ""))).resolve()
    if not export.get("artifact") or not (artifact / "manifest.json").is_file():
        raise ArtifactError(
            "the artifact of an export is not there",
            where=str(path),
            found=str(artifact),
            fix="keep the artifact: its weights are what the export is compared with",
        )
    known = {str(export[name]) for name in ("artifact_sha256", "artifact_manifest_sha256") if name in export}
    if known and manifest_sha256(artifact) not in known:
        raise ArtifactError(
            "the artifact of an export was made again since",
            where=str(artifact),
            found="another manifest than export.json names",
            fix="write the export again: `quantlab export`",
        )
    return Judged(directory, artifact, str(export.get("format")), hashlib.sha256(path.read_bytes()).hexdigest())


def exports_of(artifact: Path) -> Iterator[Path]:
    """The exports of an artifact in its run's directory: runs/NAME/exports/VARIANT.FORMAT."""
    directory = artifact.parent.parent / "exports"
    for path in sorted(directory.glob(f"{artifact.name}.*")):
        if (path / EXPORT_NAME).is_file():
            yield path


def find_source(artifact: Path, given: Path | None = None) -> Path | None:
    """The source model of an artifact; None if it cannot be found.

    The manifest names it relative to a recipe that may lie elsewhere, so a few places are tried; the fingerprint of the headers
    decides.

    Args:
        artifact: the artifact.
        given: a directory that must be it.

    Raises:
        EvaluationError: `given` is another model.
        CheckpointError: `given` cannot be read.
    """
    source = read_manifest(artifact).get("source", {})
    if given is not None:
        found = open_checkpoint(given).fingerprint()
        if source.get("fingerprint") not in (None, found):
            raise EvaluationError(
                "the artifact was made from another model",
                where=f"--source {given}",
                found=f"fingerprint {found[:12]}, the manifest says {str(source['fingerprint'])[:12]}",
                fix=f"give the directory of {source.get('model', 'its source')}",
            )
        return given
    for candidate in _places(artifact, source) if source.get("model") else ():
        if (candidate / "config.json").is_file():
            try:
                if open_checkpoint(candidate).fingerprint() == source.get("fingerprint"):
                    return candidate.resolve()
            except (CheckpointError, ArtifactError):
                continue  # something else lies there
    return None


def _places(artifact: Path, source: Mapping[str, str]) -> Iterator[Path]:
    """Where the source of an artifact may be: near it, among the models that come with quantlab, or in the cache of the hub."""
    run, model = artifact.absolute().parent.parent, source["model"]
    for base in (Path.cwd(), Path.cwd() / "recipes", run, run.parent):
        yield base / model
    known = names("model")
    if model in known:
        yield known[model]
    if "commit" in source:
        cached = cached_snapshot(model.partition("@")[0], source["commit"])
        if cached is not None:
            yield cached
