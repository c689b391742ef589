"""The whole evaluation in its own processes: records, reuse, and cells that fail."""

import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import NoReturn

import pytest

from quantlab.errors import EvaluationError
from quantlab.evaluation import hardware
from quantlab.evaluation.evaluate import Cell, EvaluationRequest, evaluate
from quantlab.evaluation.jobs import MemoryRequest, QualityRequest, QualityResult
from quantlab.evaluation.processes import CellError, Worker
from quantlab.evaluation.record import Memory, Record, read_record
from quantlab.evaluation.suite import load_suite
from tests.evaluation.conftest import write_tokenizer


def children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] not in "ZX"


@pytest.fixture
def request_(tmp_path: Path, suite: Path, model: Path, other_model: Path) -> EvaluationRequest:
    """A baseline, its exact copy, another model, and one whose weights are cut off."""
    shutil.copytree(model, tmp_path / "run" / "artifacts" / "same")
    broken = shutil.copytree(model, tmp_path / "run" / "artifacts" / "broken")
    shard = broken / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    cells = [Cell("source", "as it is", model, "../model", "0" * 64)]
    for index, (name, directory) in enumerate(
        {"broken": broken, "same": tmp_path / "run/artifacts/same", "other": other_model}.items()
    ):
        cells.append(Cell(name, "passes", directory, f"artifacts/{name}", str(index) * 64))
    return EvaluationRequest(
        directory=tmp_path / "run", recipe="test", recipe_sha256="r", suite=suite, baseline="source", cells=tuple(cells)
    )


def test_records_failures_and_reuse(request_: EvaluationRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[tuple[str, int, int]] = []
    records = evaluate(request_, progress=lambda *stage: stages.append(stage))
    assert [record.variant for record in records] == ["source", "broken", "same", "other"]
    source, broken, same, other = records
    check_rows(source, same, other)
    assert {failure.cell for failure in broken.failures} == {"quality", "memory"}
    assert all("truncated" in failure.reason and "download" in failure.reason for failure in broken.failures)
    assert broken.speed is not None, "the twin needs the config alone"
    scored = load_suite(request_.suite)
    assert (source.suite, source.suite_sha256) == ("tiny 1", scored.sha256)
    tokens = source.quality.perplexity.n if source.quality else 0
    assert ("other: quality", tokens, tokens) in stages
    assert ("speed: timing rounds", 7, 7) in stages
    written = [read_record(request_.directory / "records" / f"{record.variant}.json") for record in records]
    assert written == records

    # the same again: only what failed is measured; a changed recipe alone changes no number
    stages.clear()
    mended = dataclasses.replace(
        request_, recipe_sha256="r2", cells=tuple(cell for cell in request_.cells if cell.variant != "broken")
    )
    again = evaluate(mended, progress=lambda *stage: stages.append(stage))
    assert stages == [("3 of 3 records kept from before", 1, 1)]
    assert [record.quality for record in again] == [source.quality, same.quality, other.quality]
    assert read_record(request_.directory / "records" / "same.json").recipe_sha256 == "r2"

    # another baseline: nothing holds any more, and nothing of what was measured against the old one stays behind
    monkeypatch.setattr("quantlab.evaluation.evaluate.Worker", NoWorker)
    moved = evaluate(dataclasses.replace(mended, baseline="other"))
    assert all(record.quality is record.memory is record.speed is None for record in moved)
    assert [failure.cell for failure in moved[0].failures] == ["quality", "memory", "speed"]
    assert read_record(request_.directory / "records" / "same.json") == moved[1]


class NoWorker(Worker):
    """Gives no answer to anything."""

    def run(self, name: str, *_: object, **__: object) -> NoReturn:  # type: ignore[override]
        raise CellError(f"{name} is not answered")


def check_rows(source: Record, same: Record, other: Record) -> None:
    for record in (source, same, other):
        assert record.failures == ()
        assert record.quality is not None
        assert record.memory is not None
        assert record.speed is not None
        assert record.baseline_sha256 == "0" * 64
        assert record.memory.weights_bytes == record.memory.fp16_weights_bytes > 0
        assert record.memory.quantized_weights_percent_of_fp16 is None
        assert record.memory.peak_memory_bytes > record.memory.weights_bytes
        assert record.memory.load_seconds.n >= 3
        assert record.memory.kv_cache_bytes_per_token == 3 * (128 + 16) * 2, "layers x (latent + rotary) x bfloat16"
        assert record.memory.kv_cache == "latent of 128 + 16 bfloat16 values, 3 layers"
        assert Record.model_validate_json(record.model_dump_json()) == record
    assert source.quality is not None
    assert source.quality.kl_to_baseline is None
    assert same.quality is not None
    assert same.quality.kl_to_baseline is not None
    assert same.quality.kl_to_baseline.value == 0
    assert same.quality.perplexity == source.quality.perplexity
    assert other.quality is not None
    assert other.quality.kl_to_baseline is not None
    assert other.quality.kl_to_baseline.low > 0


def test_without_its_baseline_a_row_keeps_what_is_its_own(request_: EvaluationRequest) -> None:
    cells = tuple(cell for cell in request_.cells if cell.variant in {"broken", "same"})
    broken, same = evaluate(dataclasses.replace(request_, baseline="broken", cells=cells))
    assert broken.quality is None
    assert same.quality is not None
    assert same.quality.kl_to_baseline is None
    assert [failure.cell for failure in same.failures] == ["quality"]
    assert "the baseline failed" in same.failures[0].reason


def test_a_baseline_outside_the_cells_is_an_error(request_: EvaluationRequest) -> None:
    with pytest.raises(EvaluationError, match="not among"):
        evaluate(dataclasses.replace(request_, baseline="absent"))


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker(tmp_path_factory.mktemp("work"), threads=1, time_limit=100) as worker:
        yield worker


def test_a_killed_cell_costs_one_cell(worker: Worker, suite: Path, model: Path) -> None:
    request = MemoryRequest(directory=model, suite=suite)

    def kill(*_: object) -> None:
        for process in children(os.getpid()):
            for cell in children(process):
                os.kill(cell, signal.SIGKILL)

    with pytest.raises(CellError, match="ended by SIGKILL"):
        worker.run("memory", request, Memory, progress=kill)
    memory = worker.run("memory", request, Memory, progress=lambda *_: None)
    assert memory.artifact_bytes > memory.weights_bytes


def test_a_cell_that_takes_too_long_is_stopped(suite: Path, model: Path, tmp_path: Path) -> None:
    request = MemoryRequest(directory=model, suite=suite)
    before = children(os.getpid())
    with Worker(tmp_path / "work", threads=1, time_limit=0.01) as worker:
        with pytest.raises(CellError, match=r"longer than the 0\.01 seconds"):
            worker.run("memory", request, Memory, progress=lambda *_: None)
        assert children(os.getpid()) == before


def test_an_unforeseen_error_is_told_with_its_last_words(
    worker: Worker, suite: Path, model: Path, tmp_path: Path
) -> None:
    damaged = shutil.copytree(model, tmp_path / "damaged")
    write_tokenizer(damaged)
    (damaged / "tokenizer.json").write_text("{}")
    request = QualityRequest(directory=damaged, suite=suite, predictions=tmp_path / "kept", role="alone", key="k")
    with pytest.raises(CellError, match="exit code 1: "):
        worker.run("quality", request, QualityResult, progress=lambda *_: None)


def test_an_answer_that_holds_no_numbers_is_a_cell_that_says_so(worker: Worker, suite: Path, model: Path) -> None:
    """JSON has no word for what is not finite: it arrives as null, where the answer must have a number."""

    class Endless(Memory):
        load_seconds: float  # type: ignore[assignment]  # the cell answers with something else

    with pytest.raises(CellError, match="not what was asked for: load_seconds: Input should be a valid number"):
        worker.run("memory", MemoryRequest(directory=model, suite=suite), Endless, progress=lambda *_: None)
    assert worker.run("memory", MemoryRequest(directory=model, suite=suite), Memory, progress=lambda *_: None)


def test_a_worker_that_died_between_two_cells_is_started_again(worker: Worker, suite: Path, model: Path) -> None:
    request = MemoryRequest(directory=model, suite=suite)
    before = children(os.getpid())
    worker.run("memory", request, Memory, progress=lambda *_: None)
    for process in children(os.getpid()):
        os.kill(process, signal.SIGKILL)
    assert before
    time.sleep(0.2)  # a signal takes a moment
    assert worker.run("memory", request, Memory, progress=lambda *_: None)


def test_versions_are_told_also_where_quantlab_is_run_from_its_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package in {"quantlab", "triton"}:
            raise PackageNotFoundError(package)
        return "1.2.3"

    monkeypatch.setattr("quantlab.evaluation.hardware.version", version)
    found = hardware.versions()
    assert set(found) == {
        "python", "quantlab", "torch", "transformers", "tokenizers", "safetensors", "compressed-tensors", "numpy"
    }  # fmt: skip
    assert found["quantlab"] == "run from its sources"
    assert found["numpy"] == "1.2.3"


def test_leaving_ends_the_worker_and_its_cell(suite: Path, model: Path, tmp_path: Path) -> None:
    before = children(os.getpid())
    started: list[int] = []

    def interrupt(*_: object) -> None:
        processes = [process for process in children(os.getpid()) if process not in before]
        started.extend([*processes, *(cell for process in processes for cell in children(process))])
        raise KeyboardInterrupt

    with Worker(tmp_path / "work", threads=1, time_limit=100) as worker, pytest.raises(KeyboardInterrupt):
        worker.run("memory", MemoryRequest(directory=model, suite=suite), Memory, progress=interrupt)
    assert len(started) == 2
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in started) and time.monotonic() < deadline:
        time.sleep(0.05)  # a signal takes a moment
    assert not [pid for pid in started if alive(pid)]
