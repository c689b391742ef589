"""An artifact's manifest: the facts that records copy from it, and the check that the artifact still matches it."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from quantlab.errors import ArtifactError
from quantlab.evaluation.record import Calibrated, Made, MatrixErrors
from quantlab.files import read_json, write_atomically

_NAME = "manifest.json"
_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.*)\.weight$")
_EXPERT = re.compile(r"\.experts\.\d+\.")


def read_manifest(artifact: Path) -> dict[str, Any]:
    """The manifest; empty if there is none, as for a checkpoint that quantlab did not write."""
    path = artifact / _NAME
    return read_json(path) if path.is_file() else {}


def made_by(manifest: dict[str, Any]) -> Made | None:
    """The code, libraries and calibration device that made the artifact; None if the manifest does not state them."""
    identity = manifest.get("identity")
    if identity is None:
        return None
    calibration = identity.get("calibration")
    return Made(
        code=identity["code"],
        versions=identity["versions"],
        calibration=None if calibration is None else Calibrated(**calibration),
    )


def tokens_per_expert(manifest: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Number of calibration tokens of every routed expert by block; empty if they were not counted."""
    return {block: tuple(counts) for block, counts in manifest.get("tokens_per_expert", {}).items()}


def kept_experts(manifest: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Source indices of the experts that pruning kept, by layer; empty if no expert was removed."""
    return {layer: tuple(numbers) for layer, numbers in manifest.get("kept_experts", {}).items()}


def matrix_errors(manifest: dict[str, Any]) -> tuple[MatrixErrors, ...]:
    """Errors of the matrices that were changed, by layer and kind; matrices outside the layers come last."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for entry in manifest.get("ledger", []):
        if "relative_error" not in entry:
            continue
        found = _LAYER.match(entry["tensor"])
        key = (
            (int(found[1]), _EXPERT.sub(".experts.", found[2]))
            if found
            else (1 << 30, entry["tensor"].removesuffix(".weight"))
        )
        groups.setdefault(key, []).append(entry)
    return tuple(_summary(layer, kind, entries) for (layer, kind), entries in sorted(groups.items()))


def _summary(layer: int, kind: str, entries: list[dict[str, Any]]) -> MatrixErrors:
    relative = [entry["relative_error"] for entry in entries]
    outputs = [entry["output_error"] for entry in entries if "output_error" in entry]
    worst = max(entries, key=lambda entry: (entry.get("output_error", -1.0), entry["relative_error"]))
    return MatrixErrors(
        layer=f"layer {layer}" if layer < 1 << 30 else "outside the layers",
        kind=kind,
        count=len(entries),
        relative_error=median(relative),
        relative_error_max=max(relative),
        output_error=median(outputs) if outputs else None,
        output_error_max=max(outputs) if outputs else None,
        worst=worst["tensor"],
        fallbacks=dict(Counter(entry["fallback"] for entry in entries if entry.get("fallback"))),
    )


def weights_sha256(shards: Sequence[Path], known: Path) -> str:
    """Hash of the contents of a checkpoint's shards.

    Args:
        shards: safetensors files.
        known: cache file with the hash of each shard by size and modification time, so that a large checkpoint is read
            once; created if it does not exist.

    Raises:
        ArtifactError: `known` cannot be written.
    """
    hashes = read_json(known) if known.is_file() else {}
    found = {}
    for path in sorted(shards):
        status = path.stat()
        state = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
        found[state] = hashes.get(state) or _sha256(path)
    if found != hashes:
        write_atomically(known, json.dumps(found, indent=1).encode())
    return hashlib.sha256("\n".join(found.values()).encode()).hexdigest()


def check_unchanged(artifact: Path) -> None:
    """Refuse an artifact that was changed after it was made: the hash in its record would be wrong.

    The manifest is written last. Only the size is checked of files that are not newer than it; newer files are hashed.

    Raises:
        ArtifactError: a file is missing or differs from the manifest.
    """
    written = (artifact / _NAME).stat().st_mtime_ns if (artifact / _NAME).is_file() else 0
    for name, file in read_manifest(artifact).get("files", {}).items():
        path = artifact / name
        if not path.is_file():
            raise _changed(path, "the file is missing")
        status = path.stat()
        if status.st_size != file["bytes"]:
            raise _changed(path, f"{status.st_size:,} bytes, the manifest says {file['bytes']:,}")
        if status.st_mtime_ns > written:
            digest = _sha256(path)
            if digest != file["sha256"]:
                raise _changed(path, f"sha256 {digest[:12]}…, the manifest says {file['sha256'][:12]}…")


def _sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _changed(path: Path, found: str) -> ArtifactError:
    return ArtifactError(
        "the artifact was changed since it was made",
        where=str(path),
        found=found,
        fix="make it again: `quantlab run` with --overwrite",
    )
