"""Small files: strict JSON reading and atomic writing; the place of the cache."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantlab.errors import ArtifactError, CheckpointError, QuantlabError

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def cache_directory() -> Path:
    """Where quantlab keeps what it can make or fetch again: `quantlab` in the user's cache (`XDG_CACHE_HOME`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantlab"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a checkpoint or an artifact.

    Raises:
        CheckpointError: the file cannot be read or does not hold a JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path.name} cannot be read",
            where=str(path),
            found=error.strerror,
            fix="give the directory of a Hugging Face checkpoint",
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path.name} is not JSON", where=str(path), found=str(error), fix="download the file again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path.name} is not a JSON object",
            where=str(path),
            found=type(content).__name__,
            fix="download the file again",
        )
    return content


def read_json_lines(
    path: Path, *, fields: Sequence[str], kind: str, error: type[QuantlabError]
) -> list[dict[str, str]]:
    """Read text fields from a file of JSON lines.

    Blank lines and a byte order mark are skipped. Fields must be text of valid Unicode: null and numbers are refused, as is half
    of a surrogate pair, which JSON can write and no tokenizer can read.

    Args:
        path: the file, UTF-8.
        fields: required string fields of every line; other fields are dropped.
        kind: what the file is, for messages: "calibration text".
        error: exception type raised for every problem of the file.

    Returns:
        The fields of each line; at least one line.
    """
    fix = "write one object per line: {" + ", ".join(f'"{field}": …' for field in fields) + "}"
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise error(
            f"the {kind} cannot be read",
            where=str(path),
            found=str(problem),
            fix="give a file of JSON lines in UTF-8",
        ) from problem
    # splitlines would also cut at U+2028
    lines = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    if not lines:
        raise error(f"the {kind} is empty", where=str(path), found="no lines", fix=fix)
    found = []
    for number, line in lines:
        try:
            values: Any = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise error(
                f"a line of the {kind} is not JSON", where=f"{path}:{number}", found=str(problem), fix=fix
            ) from problem
        for field in fields:
            if not isinstance(values, dict) or not isinstance(values.get(field), str):
                raise error(f"a line of the {kind} has no {field}", where=f"{path}:{number}", found=line[:80], fix=fix)
            if not is_unicode(values[field]):
                raise error(
                    f"a line of the {kind} is not valid Unicode",
                    where=f"{path}:{number}",
                    found=f"half of a surrogate pair in `{field}`: {_around_surrogate(values[field])}",
                    fix="write both halves of the pair or the character itself, or remove it",
                )
        found.append({field: values[field] for field in fields})
    return found


def is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogates, which UTF-8 cannot hold."""
    return _LONE_SURROGATE.search(text) is None


def _around_surrogate(text: str) -> str:
    found = _LONE_SURROGATE.search(text)
    assert found is not None, "asked of text that has one"
    return ascii(text[max(found.start() - 20, 0) : found.end() + 20])


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file atomically: under a temporary name, synced, then renamed.

    Raises:
        ArtifactError: the file cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> ArtifactError:
    """The error for a failed write."""
    return ArtifactError(
        "a file cannot be written",
        where=str(path),
        found=error.strerror,
        fix="free space or choose another --out, then run the same command again: finished work is kept",
    )
