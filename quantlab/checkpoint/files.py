"""Small files, whole or not at all."""

import os
from pathlib import Path

from quantlab.errors import ArtifactError


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all.

    Raises:
        ArtifactError: the disk does not take the bytes.
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
    """What is said of a file that the disk did not take."""
    return ArtifactError(
        "a file cannot be written",
        where=str(path),
        found=error.strerror,
        fix="free space or choose another --out, then run the same command again: what is complete is kept",
    )
