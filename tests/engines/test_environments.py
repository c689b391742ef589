"""The Python that runs an engine, and installing one."""

import fcntl
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from quantlab.engine_pythons import MARK, Environment, engines_directory
from quantlab.errors import EvaluationError
from quantlab.evaluation.engines.engine import ENGINES, Engine, Platform
from quantlab.evaluation.engines.environments import (
    find_environment,
    install,
    pinned_version,
    steps_of,
    version_in,
)
from quantlab.evaluation.engines.options import described_engines, engine_names, pythons_of

LINUX = Platform("Linux", "x86_64", (3, 11))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no variable of an engine."""
    for engine in ENGINES.values():
        monkeypatch.delenv(engine.variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return engines_directory()


def _python(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("name", sorted(name for name, engine in ENGINES.items() if engine.runs))
def test_every_engine_that_runs_has_its_script_and_pinned_requirements(name: str) -> None:
    engine = ENGINES[engine_names((name,))[0]]
    assert engine.script.is_file()
    assert engine.requirements.is_file()
    assert pinned_version(engine)
    assert "quantlab" not in [
        line.split()[1].split(".")[0]
        for line in engine.script.read_text().splitlines()
        if line.startswith(("import ", "from "))
    ]


def test_the_order_of_places(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = ENGINES["vllm"]
    assert find_environment(vllm) is None
    here = find_environment(ENGINES["transformers"])
    assert here is not None
    assert (here.python, here.origin) == (Path(sys.executable), "this Python")
    installed = _python(cache / "vllm" / "bin" / "python")
    assert find_environment(vllm) is None, "without its mark it is not complete"
    (cache / "vllm" / MARK).write_text("{}")
    assert find_environment(vllm) == Environment(installed, "installed")
    named = _python(tmp_path / "variable" / "python")
    monkeypatch.setenv("QUANTLAB_VLLM_PYTHON", str(named))
    assert find_environment(vllm) == Environment(named, "variable")
    given = _python(tmp_path / "given" / "python")
    assert find_environment(vllm, {"vllm": given}) == Environment(given, "--engine-python")
    with pytest.raises(EvaluationError, match="no such file"):
        find_environment(vllm, {"vllm": tmp_path / "nothing"})
    monkeypatch.setenv("QUANTLAB_VLLM_PYTHON", str(tmp_path))
    with pytest.raises(EvaluationError, match="not an executable file"):
        find_environment(vllm)


def test_the_version_of_a_package_that_is_there_and_of_one_that_is_not(fake: Callable[[str], Engine]) -> None:
    here = Environment(Path(sys.executable), "this Python")
    assert version_in(here, fake("")) is not None
    assert version_in(here, replace(ENGINES["vllm"], package="a-package-that-is-not-there")) is None


@pytest.mark.parametrize(
    ("name", "platform", "reason"),
    [
        ("vllm", Platform("Linux", "aarch64", (3, 11)), "no build for Linux on aarch64"),
        ("vllm", Platform("Darwin", "arm64", (3, 11)), "no build for Darwin on arm64"),
        ("vllm", Platform("Linux", "x86_64", (3, 99)), "no build for Python 3.99"),
        ("sglang", LINUX, "no build for machines without its accelerator"),
    ],
)
def test_an_engine_without_a_build_is_refused_with_the_reason(name: str, platform: Platform, reason: str) -> None:
    with pytest.raises(EvaluationError, match=reason):
        install(ENGINES[engine_names((name,))[0]], lambda _: None, on=platform)


@pytest.fixture
def installable(fake: Callable[[str], Engine]) -> Engine:
    """An engine whose requirements are empty, so that nothing is fetched; the standard library plays the engine."""
    engine = replace(fake(""), module="json")
    engine.requirements.parent.mkdir()
    engine.requirements.write_text("# nothing\n")
    return engine


@pytest.mark.slow
def test_installing_writes_the_mark_last_and_a_second_time_does_nothing(installable: Engine, cache: Path) -> None:
    told: list[str] = []
    python = install(installable, told.append, on=LINUX)
    assert os.access(python, os.X_OK)
    assert (cache / installable.name / MARK).is_file()
    found = find_environment(installable)
    assert found is not None
    assert (found.python, found.origin) == (python, "installed")
    assert install(installable, told.append, on=LINUX) == python
    assert "is installed in" in told[-1]


def test_two_installations_of_an_engine_do_not_meet(installable: Engine, cache: Path) -> None:
    cache.mkdir(parents=True)
    with (cache / f"{installable.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(EvaluationError, match="is being installed by another process"):
            install(installable, lambda _: None, on=LINUX)
    assert not (cache / installable.name).exists()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["requirement", "import"])
def test_a_failed_installation_leaves_nothing(
    fault: str, installable: Engine, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_OFFLINE", "1")
    if fault == "requirement":
        installable.requirements.write_text("a-package-that-is-not-there==1\n")
    engine = installable if fault == "requirement" else replace(installable, module="a_module_that_is_not_there")
    with pytest.raises(EvaluationError, match=r"not.there") as raised:
        install(engine, lambda _: None, on=LINUX)
    assert "nothing was left behind" in str(raised.value)
    assert not (cache / engine.name).exists()


def test_requirements_are_cut_into_steps() -> None:
    text = "# pins\ntorch==2\n# step: --no-deps\ntorch==2\nengine==1\n# step\n# only a comment\n"
    assert list(steps_of(text)) == [((), "# pins\ntorch==2\n"), (("--no-deps",), "torch==2\nengine==1\n")]


def test_words_of_the_command_line() -> None:
    assert engine_names(("vllm", "transformers", "vllm")) == ("vllm", "transformers")
    assert pythons_of(("vllm=/a=b",)) == {"vllm": Path("/a=b")}
    for call in (lambda: engine_names(("vlm",)), lambda: engine_names((), "float8"), lambda: pythons_of(("vllm",)), lambda: pythons_of(("vlm=/a",))):  # fmt: skip
        with pytest.raises(EvaluationError):
            call()
    rows = {row[0]: row for row in described_engines()}
    assert set(rows) == set(ENGINES)
    assert rows["sglang"][2] == "by its rules, not run"
    assert rows["vllm"][2] == "not installed"
    assert rows["transformers"][2] == f"{sys.executable} (this Python)"
