"""An engine's process: a good answer is read, and every way to fail has its outcome."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quantlab.engine_pythons import Environment
from quantlab.evaluation.engines.engine import Engine
from quantlab.evaluation.engines.process import EngineFailure, EngineResult, Wanted, run_engine
from tests.engines.conftest import ANSWER, WRITE

HERE = Environment(Path(sys.executable), "this Python")
WANTED = Wanted(Path("model"), "float32", 1, ((1, 2, 3), (4, 5)), prompts=((1,), (4,)), greedy_tokens=3)

FAILURES = {
    "raises": ("raise ValueError('no scheme\\nfor int3 weights')", "refuses", "for int3 weights"),
    "says that it cannot": ("print('NOT HERE: no AVX512')\nraise SystemExit(3)", "not here", "no AVX512"),
    "killed for memory": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "not here", "killed, probably for memory"),
    "illegal instruction": (
        "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
        "not here",
        "the engine uses instructions that this CPU lacks",
    ),
    "aborts": ("import os; os.abort()", "refuses", "ended by SIGABRT"),
    "incomplete environment": ("import engine_that_is_not_there", "not here", "the engine's environment is incomplete"),
    "writes nothing": ("", "refuses", "no usable result: "),
    "writes no JSON": (ANSWER + "(results / 'result.json').write_text('{')", "refuses", "no usable result: result.json"),
    "writes an incomplete report": (ANSWER + "del report['version']" + WRITE, "refuses", "result.json, version: Field required"),
    "writes no tensors": (
        ANSWER + WRITE + "(results / 'result.safetensors').write_bytes(b'garbage' * 9)",
        "refuses",
        "no usable result: ",
    ),
    "wrong length": (ANSWER + "tensors['nll'] = tensors['nll'][1:]" + WRITE, "refuses", "nll is [2], expected [3]"),
    "no top": (ANSWER + "del tensors['top']" + WRITE, "refuses", "top is missing, expected [3]"),
    "wrong greedy": (ANSWER + "tensors['greedy'] = tensors['greedy'][:, 1:]" + WRITE, "refuses", "greedy is [2, 2], expected [2, 3]"),
}  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
def test_every_failure_has_an_outcome(failure: str, fake: Callable[[str], Engine]) -> None:
    script, outcome, reason = FAILURES[failure]
    found = run_engine(fake(script), HERE, WANTED, seconds=60)
    assert isinstance(found, EngineFailure)
    assert found.outcome == outcome
    assert reason in found.reason


def test_an_answer_is_read_and_a_flood_of_output_is_not_kept(fake: Callable[[str], Engine]) -> None:
    flood = "for _ in range(20000): print('x' * 500)\n"
    found = run_engine(fake(ANSWER + flood + WRITE), HERE, WANTED, seconds=60)
    assert isinstance(found, EngineResult)
    assert found.report.version == "1.2"
    assert found.nll.tolist() == [2.0, 2.0, 2.0]
    assert found.greedy is not None
    assert found.greedy.shape == (2, 3)


def test_nan_is_a_result_and_no_failure(fake: Callable[[str], Engine]) -> None:
    found = run_engine(fake(ANSWER + "tensors['nll'][0] = np.nan" + WRITE), HERE, WANTED, seconds=60)
    assert isinstance(found, EngineResult)
    assert np.isnan(found.nll).tolist() == [True, False, False]


def test_a_hanging_engine_is_ended_with_its_children(fake: Callable[[str], Engine], tmp_path: Path) -> None:
    child = tmp_path / "child"
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(child)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    engine, seconds = fake(script), 1.0
    while not child.is_file() or not child.read_text():  # until Python started in time
        seconds *= 2
        found = run_engine(engine, HERE, WANTED, seconds=seconds)
        assert found == EngineFailure("not here", f"no result within {seconds:g} seconds")
    number, deadline = int(child.read_text()), time.monotonic() + 10
    while _runs(number) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(number)


def _runs(number: int) -> bool:
    try:
        os.kill(number, 0)
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_script_finds_the_files_beside_it_that_have_its_name(fake: Callable[[str], Engine]) -> None:
    engine = fake(ANSWER + "import fake_products; report['version'] = fake_products.VERSION" + WRITE)
    (engine.script.parent / "fake_products.py").write_text("VERSION = '7'")
    found = run_engine(engine, HERE, WANTED, seconds=60)
    assert isinstance(found, EngineResult)
    assert found.report.version == "7"


def test_a_script_is_not_found_in_place_of_the_engine_it_is_named_after(fake: Callable[[str], Engine]) -> None:
    engine = fake(ANSWER + "import fake" + WRITE)
    found = run_engine(engine, HERE, WANTED, seconds=60)
    assert isinstance(found, EngineFailure)
    assert "No module named 'fake'" in found.reason
