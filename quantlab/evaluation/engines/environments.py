"""The Python that runs an engine, and installing one.

**Installing.** An environment is a venv under the user's cache, filled by uv or pip from the packaged file of requirements. A venv
cannot be moved, so it is built in its place; its mark is written last, after the engine was imported once, and a folder without
mark counts as absent and is removed by the next installation.

**Requirements.** A file of pip's format, cut into steps by lines `# step` or `# step: OPTIONS`, each of which is one call of the
installer with these options (`--no-deps`). What must not be replaced by later steps is pinned in each.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from quantlab.engine_pythons import (
    MARK,
    NOT_PASSED_ON,
    Environment,
    clean_environment,
    engines_directory,
    find_python,
    is_complete,
    python_of,
)
from quantlab.errors import EvaluationError
from quantlab.evaluation.engines.engine import Engine, Platform
from quantlab.files import write_atomically

_VERSION_SECONDS: Final = 120


def find_environment(engine: Engine, given: Mapping[str, Path] | None = None) -> Environment | None:
    """The Python that runs an engine; None if there is none.

    Args:
        engine: the engine.
        given: paths of Pythons by engine, from the command line; they come first, then the variable, then what was installed.

    Raises:
        EvaluationError: a given path, or that of the variable, is not an executable file.
    """
    found = find_python(engine.name, engine.stem, engine.module, (given or {}).get(engine.name))
    if found is not None and found.origin in {"--engine-python", "variable"} and not found.is_executable:
        raise EvaluationError(
            "the Python of an engine cannot be started",
            where=engine.variable if found.origin == "variable" else f"--engine-python {engine.name}",
            found=f"{found.python}: {'no such file' if not found.python.exists() else 'not an executable file'}",
            fix="give the path of a Python executable, for example ENVIRONMENT/bin/python",
        )
    return found


def version_in(environment: Environment, engine: Engine) -> str | None:
    """The version of the engine's package in an environment; None if it is not there or the Python cannot be started."""
    code = f"import importlib.metadata as m; print(m.version({engine.package!r}))"
    try:
        done = subprocess.run(
            [str(environment.python), "-c", code],
            capture_output=True,
            text=True,
            timeout=_VERSION_SECONDS,
            env=clean_environment(),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else None


def this_platform() -> Platform:
    """The machine and Python that quantlab runs on, whose Python new environments get."""
    return Platform(platform.system(), platform.machine(), (sys.version_info.major, sys.version_info.minor))


def pinned_version(engine: Engine) -> str:
    """The engine's version in its file of requirements; empty if it has none."""
    text = engine.requirements.read_text(encoding="utf-8") if engine.requirements.is_file() else ""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    found = (line.partition("==") for line in lines if "==" in line)
    return next((version.strip() for name, _, version in found if name.strip().lower() == engine.package), "")


def install(engine: Engine, tell: Callable[[str], None], *, on: Platform | None = None) -> Path:
    """Install an engine's environment, unless the same one is there.

    Args:
        engine: the engine.
        tell: called with every line of the installer.
        on: the platform; this one if None.

    Returns:
        The environment's Python.

    Raises:
        EvaluationError: there is no build for the platform, another installation of the engine is running, the installer failed, or
            the installed engine cannot be imported. Nothing is left behind.
    """
    reason = engine.no_build(on or this_platform())
    if reason is None and not engine.requirements.is_file():
        reason = f"quantlab has no tested requirements of {engine.name}"
    if reason is not None:
        raise EvaluationError(
            "the engine cannot be installed here",
            where=engine.name,
            found=reason,
            fix=f"run it elsewhere, or name a Python that has it: {engine.variable}=PATH",
        )
    with _alone(engine):
        return _installed(engine, tell)


@contextmanager
def _alone(engine: Engine) -> Iterator[None]:
    """Hold the engine's lock: a second installation would remove the folder that the first one fills."""
    path = engines_directory() / f"{engine.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EvaluationError(
                "the engine is being installed by another process",
                where=str(path),
                found="its lock is held",
                fix="wait until it is installed",
            ) from error
        yield


def _installed(engine: Engine, tell: Callable[[str], None]) -> Path:
    directory = engines_directory() / engine.name
    wanted = hashlib.sha256(engine.requirements.read_bytes()).hexdigest()
    mark = _mark_of(directory)
    if mark is not None and mark.get("requirements_sha256") == wanted:
        tell(f"{engine.name} is installed in {directory}")
        return python_of(directory)
    shutil.rmtree(directory, ignore_errors=True)
    try:
        python = _fill(engine, directory, tell)
        write_atomically(directory / MARK, json.dumps({"engine": engine.name, "requirements_sha256": wanted}).encode())
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return python


def steps_of(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """The steps of a file of requirements: options of the installer, and the lines it installs."""
    options: tuple[str, ...] = ()
    lines: list[str] = []
    for line in [*text.splitlines(), "# step"]:
        head, colon, rest = line.partition(":")
        if head.strip() != "# step":
            lines.append(line)
            continue
        if any(one.split("#")[0].strip() for one in lines):
            yield options, "\n".join(lines) + "\n"
        options, lines = tuple(rest.split()) if colon else (), []


def _fill(engine: Engine, directory: Path, tell: Callable[[str], None]) -> Path:
    """Make a venv, install the requirements and import the engine once; the venv's Python."""
    uv = shutil.which("uv")
    make = [uv, "venv", "--python", sys.executable] if uv else [sys.executable, "-m", "venv"]
    _call([*make, str(directory)], engine, tell)
    python = python_of(directory)
    installer = [uv, "pip", "install", "--python", str(python)] if uv else [str(python), "-m", "pip", "install"]
    steps = list(steps_of(engine.requirements.read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory(prefix="quantlab-engine-") as temporary:
        for number, (options, lines) in enumerate(steps, start=1):
            tell(f"{engine.name}: step {number} of {len(steps)}")
            file = Path(temporary) / f"{number}.txt"
            file.write_text(lines, encoding="utf-8")
            _call([*installer, *options, "-r", str(file)], engine, tell)
    tell(f"{engine.name}: importing")
    _call([str(python), "-c", f"import {engine.module}"], engine, tell)
    return python


def _call(command: Sequence[str], engine: Engine, tell: Callable[[str], None]) -> None:
    """Run one command of an installation and pass its lines on.

    Raises:
        EvaluationError: it failed, with its last lines.
    """
    last: deque[str] = deque(maxlen=5)
    environment = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment | dict(engine.building),
    ) as process:
        assert process.stdout is not None, "started with a pipe"
        for line in process.stdout:
            if line.strip():
                last.append(line.strip()[:300])
                tell(last[-1])
        status = process.wait()
    if status != 0:
        raise EvaluationError(
            "the engine's environment cannot be installed",
            where=" ".join(command)[:200],
            found="; ".join(last) or f"exit code {status}",
            fix=f"correct that and run `quantlab engines install {engine.name}` again: nothing was left behind",
        )


def _mark_of(directory: Path) -> dict[str, str] | None:
    """The mark of a complete environment; None if there is none."""
    if not is_complete(directory):
        return None
    found: dict[str, str] = json.loads((directory / MARK).read_bytes())
    return found
