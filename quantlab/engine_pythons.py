"""The Python of an engine: given, named by a variable, or of an environment that quantlab installed. Exports and evaluation use it.

An engine, or a program that writes a format for it, runs in an environment of its own, because their requirements contradict each
other. `quantlab engines install` fills one under the user's cache; its mark is written last, so a folder without mark is incomplete.
"""

import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from quantlab.files import cache_directory

MARK: Final = "quantlab-engine.json"
"""File that is written last into an environment."""
NOT_PASSED_ON: Final = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP")
"""Variables of this Python that would mislead another one."""

Origin = Literal["--engine-python", "variable", "installed", "this Python"]


@dataclass(frozen=True)
class Environment:
    """A Python that runs an engine.

    Attributes:
        python: its executable.
        origin: how it was found.
    """

    python: Path
    origin: Origin

    @property
    def is_executable(self) -> bool:
        """Whether it can be started."""
        return self.python.is_file() and os.access(self.python, os.X_OK)


def engines_directory() -> Path:
    """Where environments are installed: `quantlab/engines` in the user's cache (`XDG_CACHE_HOME`)."""
    return cache_directory() / "engines"


def variable_of(stem: str) -> str:
    """The environment variable that names the Python of an engine, by the stem of the engine's script."""
    return f"QUANTLAB_{stem.upper()}_PYTHON"


def python_of(directory: Path) -> Path:
    """The Python of an installed environment."""
    return directory / "bin" / "python"


def is_complete(directory: Path) -> bool:
    """Whether an environment was installed to its end."""
    return (directory / MARK).is_file() and python_of(directory).exists()


def find_python(name: str, stem: str, module: str, given: Path | None = None) -> Environment | None:
    """The Python of an engine, not looked at yet where it was named; None if there is none.

    Args:
        name: the engine's name, and that of its folder.
        stem: of its script.
        module: the Python module of the engine; the engine transformers may be in this Python.
        given: a path from the command line; it comes first, then the variable, then what was installed.
    """
    if given:
        return Environment(given.absolute(), "--engine-python")  # not resolved: a venv's Python is a link
    if variable := os.environ.get(variable_of(stem)):
        return Environment(Path(variable).absolute(), "variable")
    directory = engines_directory() / name
    if is_complete(directory):
        return Environment(python_of(directory), "installed")
    if name == "transformers" and importlib.util.find_spec(module) is not None:
        return Environment(Path(sys.executable), "this Python")
    return None


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of a process in another environment: those of this process without its own Python's, and without network."""
    kept = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
    return (
        kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONNOUSERSITE": "1"} | dict(extra or {})
    )
