"""Cells measured side by side: the same numbers as one by one, timed cells alone, one Ctrl-C ends all."""

import dataclasses
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quantlab import hardware
from quantlab.errors import EvaluationError
from quantlab.evaluation.evaluate import evaluate
from quantlab.evaluation.machine import capacity
from quantlab.evaluation.machine.capacity import cells_at_once
from quantlab.evaluation.memory.metrics import Memory
from quantlab.evaluation.processes.messages import MemoryRequest
from quantlab.evaluation.processes.worker_client import CellError, Worker
from quantlab.evaluation.processes.workers import Workers
from quantlab.evaluation.request import EvaluatedArtifact, EvaluationRequest


@pytest.fixture
def request_(tmp_path: Path, model: Path, other_model: Path, suite: Path) -> EvaluationRequest:
    artifacts = (
        EvaluatedArtifact("source", "as it is", model, "../model", "0" * 64),
        EvaluatedArtifact("other", "passes", other_model, "artifacts/other", "1" * 64),
        EvaluatedArtifact("same", "passes", model, "artifacts/same", "2" * 64),
        EvaluatedArtifact("again", "passes", other_model, "artifacts/again", "3" * 64),
    )
    return EvaluationRequest(
        directory=tmp_path / "run",
        recipe="test",
        recipe_sha256="r",
        suite=suite,
        baseline="source",
        artifacts=artifacts,
    )


@pytest.mark.slow
def test_numbers_do_not_depend_on_what_runs_beside(
    request_: EvaluationRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: set[str] = set()
    seen: list[tuple[str, frozenset[str]]] = []
    lock = threading.Lock()

    class Watched(Worker):
        def run(self, name: str, *arguments: object, **options: object) -> object:  # type: ignore[override]
            with lock:
                running.add(name)
                seen.append((name, frozenset(running)))
            try:
                return super().run(name, *arguments, **options)  # type: ignore[arg-type]
            finally:
                with lock:
                    running.discard(name)

    monkeypatch.setattr("quantlab.evaluation.processes.workers.Worker", Watched)
    monkeypatch.setattr(hardware, "threads", lambda: 3)  # one for each cell: sums depend on the number of threads
    together = evaluate(dataclasses.replace(request_, side_by_side=3))
    beside, seen[:] = dict(seen), []
    monkeypatch.setattr(hardware, "threads", lambda: 1)
    alone = evaluate(dataclasses.replace(request_, reuse=False))
    assert all(running == {name} for name, running in seen)
    # every layout is prepared beside the baseline, timing has the machine for itself, loading has no quality beside it
    assert {name for name in beside if name.startswith("speed-")} == {
        "speed-0", "speed-1", "speed-source", "speed-other", "speed-same", "speed-again"
    }  # fmt: skip
    assert beside["speed-0"] == {"speed-0"}
    assert beside["speed-1"] == {"speed-1"}
    assert all(other.endswith("memory") for other in beside["same-memory"])
    assert max(len(running) for running in beside.values()) == 3
    for one, other in zip(together, alone, strict=True):
        assert one.failures == other.failures == ()
        assert one.quality == other.quality
        assert one.served == other.served
        assert one.speed is not None
        assert one.memory is not None
        assert other.memory is not None
        assert one.memory.weights_bytes == other.memory.weights_bytes


@pytest.mark.slow
def test_an_error_in_one_call_ends_the_cells_of_all(suite: Path, model: Path, tmp_path: Path) -> None:
    """Ctrl-C arrives in the main thread the same way, as an exception while it waits."""
    started = threading.Event()
    ended: list[str] = []

    def long() -> None:
        try:
            workers.run("long", MemoryRequest(directory=model, suite=suite), Memory, progress=lambda *_: _wait(started))
        except (CellError, EvaluationError) as error:
            ended.append(str(error))
            raise

    def fails() -> None:
        assert started.wait(100)
        raise KeyboardInterrupt

    with Workers(tmp_path / "work", count=2, threads=2, time_limit=100) as workers:
        with pytest.raises(KeyboardInterrupt):
            workers.side_by_side([long, fails])
        processes = [worker._process for worker in workers._workers]
        with pytest.raises(EvaluationError, match="the evaluation was ended"):
            workers.run("later", MemoryRequest(directory=model, suite=suite), Memory, progress=lambda *_: None)
    assert len(ended) == 1
    assert "the evaluation was ended" in ended[0]
    for process in processes:
        if process is not None:
            with pytest.raises(ProcessLookupError):
                os.killpg(process.pid, 0)


def _wait(started: threading.Event) -> None:
    started.set()
    time.sleep(0.5)


def test_the_number_of_cells_fits_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda": 40 << 30, "cpu": 500 << 30}
    monkeypatch.setattr(capacity, "free_bytes", lambda device: free[device.type])
    monkeypatch.setattr(capacity, "needed_bytes", lambda directory, _: int(directory.name) << 30)
    monkeypatch.setattr(capacity, "hardware", SimpleNamespace(threads=lambda: 16))
    cuda = torch.device("cuda")
    small, large = Path("1"), Path("16")
    assert cells_at_once([small] * 10, torch.device("cpu")) == 1
    assert cells_at_once([small] * 10, cuda) == 8  # two cores each; 40 / (2 + 3) = 8 fit as well
    assert cells_at_once([small] * 3, cuda) == 3
    assert cells_at_once([small, large], cuda) == 1  # 40 / (32 + 3)
    free["cpu"] = 21 << 30
    assert cells_at_once([small] * 10, cuda) == 4
    free["cuda"] = 1
    assert cells_at_once([small], cuda) == 1
