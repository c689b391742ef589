"""The device of cells: given by the request, checked before any work, and not initialized by the worker itself."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from quantlab import cli, hardware
from quantlab.errors import DeviceError
from quantlab.evaluation.evaluate import evaluate
from quantlab.evaluation.machine import time_and_memory
from quantlab.evaluation.processes.messages import CellRequest, MemoryRequest
from quantlab.evaluation.processes.worker_client import CellError, Worker
from quantlab.evaluation.request import EvaluatedArtifact, EvaluationRequest

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


@no_gpu
@pytest.mark.parametrize("verb", ["run", "eval"])
def test_a_device_that_is_not_there_is_told_before_any_work(verb: str, tmp_path: Path) -> None:
    found = CliRunner().invoke(cli.app, [verb, str(RECIPE), "--device", "cuda", "--out", str(tmp_path / "out")])
    assert isinstance(found.exception, DeviceError)
    assert "device cuda" in str(found.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@no_gpu
def test_a_cell_computes_where_it_is_asked_to(tmp_path: Path, model: Path, suite: Path) -> None:
    request = MemoryRequest(directory=model, suite=suite, device="cuda:3")
    message = "no such device; where: device cuda:3"
    with Worker(tmp_path / "work", threads=1, time_limit=120) as worker, pytest.raises(CellError, match=message):
        worker.run("cell", request, MemoryRequest, progress=lambda *_: None)


def test_every_cell_is_told_the_device(
    tmp_path: Path, model: Path, suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[CellRequest] = []

    class Told(Worker):
        def run(self, name: str, request: CellRequest, *_: object, **__: object) -> None:  # type: ignore[override]
            asked.append(request)
            raise CellError("told")

    monkeypatch.setattr("quantlab.evaluation.processes.workers.Worker", Told)
    request = EvaluationRequest(
        directory=tmp_path / "run",
        recipe="test",
        recipe_sha256="r",
        suite=suite,
        baseline="source",
        artifacts=(EvaluatedArtifact("source", "as it is", model, "../model", "0" * 64),),
        device="cuda:1",
        gpu="A GPU",
    )
    record = evaluate(request)[0]
    assert {one.device for one in asked} == {"cuda:1"}
    assert {one.kind for one in asked} >= {"quality", "served", "memory", "speed"}
    assert record.hardware == f"A GPU; {hardware.describe()}"
    assert evaluate(dataclasses.replace(request, gpu=""))[0].hardware == hardware.describe()


@pytest.mark.slow
def test_the_worker_leaves_cuda_alone() -> None:
    """The worker forks its cells, and CUDA does not work in a process that was forked after CUDA was initialized."""
    code = """
import torch
def told(*_, **__):
    raise SystemExit("CUDA was touched")
for name in ("is_available", "device_count", "init", "_lazy_init", "current_device", "get_device_capability"):
    setattr(torch.cuda, name, told)
from quantlab.evaluation.processes import worker
worker.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert '"ready"' in done.stdout


def test_a_peak_of_this_process_can_be_forgotten() -> None:
    cpu = torch.device("cpu")
    large = torch.ones(1 << 26)
    assert min(time_and_memory.peak_bytes(cpu), time_and_memory.held_bytes(cpu)) >= large.nbytes
    before = time_and_memory.peak_bytes(cpu)
    del large
    if time_and_memory.reset_peak(cpu):
        assert time_and_memory.peak_bytes(cpu) < before - (1 << 27)
