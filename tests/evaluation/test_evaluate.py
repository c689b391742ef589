"""The whole evaluation with its processes: records, reuse, and failing cells."""

import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn, cast

import pytest

from quantlab import hardware
from quantlab.errors import EvaluationError
from quantlab.evaluation import evaluate as evaluation
from quantlab.evaluation.evaluate import evaluate
from quantlab.evaluation.memory.metrics import Memory
from quantlab.evaluation.processes import artifact_cells as measuring
from quantlab.evaluation.processes.artifact_cells import EvaluationContext, SpeedProcesses
from quantlab.evaluation.processes.messages import (
    CellRequest,
    MemoryRequest,
    QualityRequest,
    QualityResult,
    TaskAnswer,
    TasksRequest,
    TasksResult,
)
from quantlab.evaluation.processes.worker_client import CellError, Worker
from quantlab.evaluation.processes.workers import Workers
from quantlab.evaluation.record import Record, read_record
from quantlab.evaluation.request import EvaluatedArtifact, EvaluationRequest
from quantlab.evaluation.suite import load_suite
from quantlab.version import VERSION


def children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] not in "ZX"


@pytest.fixture
def request_(tmp_path: Path, suite: Path, model: Path, other_model: Path) -> EvaluationRequest:
    """A baseline, its exact copy, another model, and a model with truncated weights."""
    shutil.copytree(model, tmp_path / "run" / "artifacts" / "same")
    broken = shutil.copytree(model, tmp_path / "run" / "artifacts" / "broken")
    shard = broken / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    artifacts = [EvaluatedArtifact("source", "as it is", model, "../model", "0" * 64)]
    for index, (name, directory) in enumerate(
        {"broken": broken, "same": tmp_path / "run/artifacts/same", "other": other_model}.items()
    ):
        artifacts.append(EvaluatedArtifact(name, "passes", directory, f"artifacts/{name}", str(index) * 64))
    return EvaluationRequest(
        directory=tmp_path / "run",
        recipe="test",
        recipe_sha256="r",
        suite=suite,
        baseline="source",
        artifacts=tuple(artifacts),
    )


def watched(asked: list[str]) -> type[Worker]:
    """A worker class that appends the names of its cells to `asked`."""

    class Watched(Worker):
        def run(self, name: str, *arguments: object, **options: object) -> object:  # type: ignore[override]
            asked.append(name)
            return super().run(name, *arguments, **options)  # type: ignore[arg-type]

    return Watched


def of_two(request: EvaluationRequest) -> EvaluationRequest:
    """Only the baseline and its copy."""
    return dataclasses.replace(
        request, artifacts=tuple(artifact for artifact in request.artifacts if artifact.variant in {"source", "same"})
    )


@pytest.mark.slow
def test_records_failures_and_reuse(request_: EvaluationRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[tuple[str, int, int]] = []
    records = evaluate(request_, progress=lambda *stage: stages.append(stage))
    assert [record.variant for record in records] == ["source", "broken", "same", "other"]
    source, broken, same, other = records
    check_rows(source, same, other)
    assert {failure.cell for failure in broken.failures} == {"quality", "served", "memory"}
    assert all("truncated" in failure.reason and "download" in failure.reason for failure in broken.failures)
    assert broken.speed is not None, "the twin needs the config alone"
    scored = load_suite(request_.suite)
    assert (source.suite, source.suite_sha256) == ("tiny 1", scored.sha256)
    tokens = source.quality.perplexity.n if source.quality else 0
    assert ("other: quality", tokens, tokens) in stages
    assert {("speed, process 1: timing rounds", 4, 4), ("speed, process 2: timing rounds", 4, 4)} <= set(stages)
    written = [read_record(request_.directory / "records" / f"{record.variant}.json") for record in records]
    assert written == records

    # again: only failed cells are measured; a changed recipe file alone does not invalidate records
    stages.clear()
    mended = dataclasses.replace(
        request_,
        recipe_sha256="r2",
        artifacts=tuple(artifact for artifact in request_.artifacts if artifact.variant != "broken"),
    )
    again = evaluate(mended, progress=lambda *stage: stages.append(stage))
    assert stages == [("3 of 3 records kept from before", 1, 1)]
    assert [record.quality for record in again] == [source.quality, same.quality, other.quality]
    assert read_record(request_.directory / "records" / "same.json").recipe_sha256 == "r2"

    # another baseline: all records are invalid, and no result against the old baseline remains
    monkeypatch.setattr("quantlab.evaluation.processes.workers.Worker", NoWorker)
    moved = evaluate(dataclasses.replace(mended, baseline="other"))
    assert all(record.quality is record.memory is record.speed is None for record in moved)
    assert {failure.cell for failure in moved[0].failures} == {"quality", "served", "memory", "speed"}
    assert read_record(request_.directory / "records" / "same.json") == moved[1]


@pytest.mark.slow
def test_a_cell_is_measured_again_after_its_code_has_changed(
    request_: EvaluationRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code of one cell: only that cell of every row. An environment that chooses other instructions: everything."""
    asked: list[str] = []
    request = of_two(request_)
    monkeypatch.setattr("quantlab.evaluation.processes.workers.Worker", watched(asked))
    first = evaluate(request)
    assert all(set(record.code) == set(evaluation._CELLS) for record in first)
    asked.clear()
    assert evaluate(request) == first
    assert not asked

    known = evaluation.code_fingerprint

    def changed(roots: tuple[str, ...], *, without: tuple[str, ...] = ()) -> str:
        return "changed" if "quantlab.evaluation.memory.measure" in roots else known(roots, without=without)

    monkeypatch.setattr("quantlab.evaluation.evaluate.code_fingerprint", changed)
    again = evaluate(request)
    assert asked == ["source-memory", "same-memory"]
    assert {record.code["memory"] for record in again} == {"changed"}
    assert [record.quality for record in again] == [record.quality for record in first]
    asked.clear()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    moved = evaluate(request)
    assert {"source-quality", "same-quality", "source-memory", "speed-0"} <= set(asked)
    assert all(record.environment["ATEN_CPU_CAPABILITY"] == "avx2" for record in moved)


@pytest.mark.slow
def test_a_rerun_tries_what_failed_and_keeps_the_rest(
    request_: EvaluationRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class MemoryFails(watched(asked)):  # type: ignore[misc]
        def run(self, name: str, *arguments: object, **options: object) -> object:  # type: ignore[override]
            if name == "same-memory":
                raise CellError("out of memory")
            return super().run(name, *arguments, **options)

    request = of_two(request_)
    monkeypatch.setattr("quantlab.evaluation.processes.workers.Worker", MemoryFails)
    first = evaluate(request)
    assert [[(one.cell, one.reason) for one in record.failures] for record in first] == [
        [],
        [("memory", "out of memory")],
    ]
    assert asked == [
        "speed-0",
        "source-quality",
        "source-served",
        "source-memory",
        "same-quality",
        "same-served",
        "speed-1",
    ]
    asked.clear()
    monkeypatch.setattr("quantlab.evaluation.processes.workers.Worker", watched(asked))
    second = evaluate(request)
    assert asked == ["same-memory"]
    assert second[0] == first[0]
    assert second[1].memory is not None
    assert second[1].failures == ()
    assert (second[1].quality, second[1].speed) == (first[1].quality, first[1].speed)
    assert read_record(request.directory / "records" / "same.json") == second[1]
    asked.clear()
    shutil.rmtree(request.directory / "records" / ".baseline")
    (request.directory / "records" / "same.json").unlink()
    third = evaluate(request)
    assert asked == ["speed-0", "source-quality", "same-quality", "same-served", "same-memory", "speed-1"], (
        "the baseline answers again"
    )
    assert [record.quality for record in third] == [record.quality for record in second]


@pytest.mark.slow
def test_an_evaluation_that_stops_before_speed_is_known_goes_on_from_there(
    request_: EvaluationRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Stops(watched(asked)):  # type: ignore[misc]
        def run(self, name: str, *arguments: object, **options: object) -> object:
            if name == "speed-1" and "again" not in asked:
                raise KeyboardInterrupt
            return super().run(name, *arguments, **options)

    request = of_two(request_)
    monkeypatch.setattr("quantlab.evaluation.processes.workers.Worker", Stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate(request)
    kept = read_record(request.directory / "records" / "same.json")
    assert kept.speed is None
    assert kept.quality is not None
    assert kept.failures == ()
    asked.append("again")
    records = evaluate(request)
    assert asked[asked.index("again") + 1 :] == ["speed-0", "speed-1"]
    assert records[1].speed is not None
    assert records[1].quality is not None
    assert records[1].quality.perplexity == kept.quality.perplexity


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        (2, ["speed-0", 0, 1, 2, 3, "speed-1"]),
        (3, ["speed-0", 0, 1, "speed-1", 2, 3, "speed-2"]),
        (4, ["speed-0", 0, 1, "speed-1", 2, "speed-2", 3, "speed-3"]),
    ],
)
def test_processes_of_speed_are_spread_over_the_rows(
    processes: int, expected: list[object], request_: EvaluationRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[object] = []
    suite = load_suite(request_.suite)
    assert suite.suite.speed is not None
    speed = suite.suite.speed.model_copy(update={"processes": processes})
    suite = dataclasses.replace(suite, suite=suite.suite.model_copy(update={"speed": speed}))
    worker = SimpleNamespace(
        run=lambda name, *_, **__: happened.append(name) or SimpleNamespace(failures={}, timed="twin")
    )
    monkeypatch.setattr(
        "quantlab.evaluation.processes.artifact_cells.speeds_of", lambda _, results: {"a": len(results)}
    )
    bench = SimpleNamespace(workers=worker, suite=suite, device="cpu", progress=print)
    turns = SpeedProcesses(cast(EvaluationContext, bench), {"a": Path("a")}, Path("source"))
    for row in range(4):
        turns.run_due(row / 4)
        happened.append(row)
    turns.run_due(1.0)
    assert happened == expected
    assert turns.speeds == {"a": processes}


ITEMS = [
    {
        "id": index,
        "document": f"d{index}",
        "context": f"the sun rose over {index}",
        "choices": [" a quiet harbour", " nobody spoke"],
        "answer": index % 2,
    }
    for index in range(12)
]


def write_task(directory: Path, name: str) -> None:
    (directory / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (directory / f"{name}.yaml").write_text(
        f"name: {name}\nversion: 1\nkind: choice\nitems: {name}.jsonl\nmetrics: [accuracy]\nrandom_baseline: 0.5\ndescription: d\n"
    )


@pytest.mark.slow
def test_a_task_that_ends_the_process_costs_itself_alone(
    request_: EvaluationRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        write_task(request_.suite.parent, name)
    text = request_.suite.read_text()
    request_.suite.write_text(
        text[: text.index("speed:")] + "tasks: [{task: first.yaml, items: 8, seeds: [0, 1]}, {task: second.yaml}]\n"
    )
    request = dataclasses.replace(
        request_,
        artifacts=tuple(artifact for artifact in request_.artifacts if artifact.variant in {"source", "other"}),
    )
    asked: list[tuple[str, tuple[int, ...]]] = []

    class Watched(Worker):
        def run(self, name: str, request: CellRequest, *arguments: object, **options: object) -> object:  # type: ignore[override]
            if isinstance(request, TasksRequest):
                asked.append((name, request.runs))
            return super().run(name, request, *arguments, **options)  # type: ignore[arg-type]

    class Dies(Watched):
        """Dies in the baseline's second task."""

        def run(self, name: str, request: CellRequest, *arguments: object, **options: object) -> object:  # type: ignore[override]
            if isinstance(request, TasksRequest) and request.role == "baseline" and 1 in request.runs:
                before = tuple(run for run in request.runs if run < 1)
                super().run(name, request.model_copy(update={"runs": before}), *arguments, **options)
                options["part"](TaskAnswer(run=1).model_dump_json())  # type: ignore[operator]
                raise CellError("it was ended by SIGKILL")
            return super().run(name, request, *arguments, **options)

    monkeypatch.setattr("quantlab.evaluation.processes.workers.Worker", Dies)
    source, other = evaluate(request)
    assert asked == [("source-tasks", (0,)), ("source-tasks", (2,)), ("other-tasks", (0, 1, 2))]
    assert [one.reason for one in source.failures] == ["first, seed 1: it was ended by SIGKILL"]
    assert [(task.name, task.seed) for task in source.tasks] == [("first", 0), ("second", 0)]
    assert [(task.name, task.seed, task.loss is None) for task in other.tasks] == [
        ("first", 0, False), ("first", 1, True), ("second", 0, False)
    ]  # fmt: skip
    assert [one.reason for one in other.failures] == [
        "first, seed 1: nothing to compare with: the baseline did not answer it"
    ]
    asked.clear()
    monkeypatch.setattr("quantlab.evaluation.processes.workers.Worker", Watched)
    again = evaluate(request)
    assert asked == [("source-tasks", (1,)), ("other-tasks", (1,))]
    assert all(record.failures == () and len(record.tasks) == 3 for record in again)
    assert again[1].tasks[1].loss is not None
    assert again[0].tasks[::2] == source.tasks


def test_a_task_whose_answer_is_no_number_says_so(request_: EvaluationRequest) -> None:
    write_task(request_.suite.parent, "choice")
    request_.suite.write_text(request_.suite.read_text() + "tasks: [{task: choice.yaml, seeds: [0, 1]}]\n")

    class Odd(Worker):
        def run(self, name: str, request: CellRequest, *_: object, **options: object) -> object:  # type: ignore[override]
            part: Callable[[str], None] = options["part"]  # type: ignore[assignment]
            part(TaskAnswer(run=0).model_dump_json())
            part('{"run": 0, "result": null, "reason": null, "odd": null}')
            part(TaskAnswer(run=1).model_dump_json())
            part(TaskAnswer(run=1, reason="too hard").model_dump_json())
            return TasksResult(answered=2)

    bench = EvaluationContext(
        workers=cast(Workers, Odd(request_.directory, threads=1, time_limit=1)),
        suite=load_suite(request_.suite),
        predictions=request_.directory,
        scores=request_.directory,
        key="",
        device="cpu",
        progress=lambda *_: None,
    )
    found = measuring._tasks(bench, "row", request_.directory, {}, is_baseline=True)
    assert [answer.run for answer in found] == [0, 1]
    assert [answer.reason for answer in found][1] == "too hard"
    assert "its answer is invalid: odd" in str(found[0].reason)


@pytest.mark.slow
def test_two_evaluations_of_one_artifact_give_the_same_accuracy(request_: EvaluationRequest) -> None:
    write_task(request_.suite.parent, "choice")
    text = request_.suite.read_text()
    request_.suite.write_text(text[: text.index("speed:")] + "tasks: [{task: choice.yaml, items: 8}]\n")
    artifacts = tuple(artifact for artifact in request_.artifacts if artifact.variant in {"source", "other"})
    first, second = (
        evaluate(dataclasses.replace(request_, artifacts=artifacts, directory=request_.directory.parent / name))
        for name in ("one", "two")
    )
    other = first[1]
    assert other.failures == ()
    assert other.quality is not None
    assert other.quality.divergence is not None
    assert other.quality.kl_to_baseline is not None
    assert other.quality.kl_to_baseline.value > 0
    assert other.quality.divergence.layer_errors
    assert other.tasks[0].loss is not None
    assert [(record.quality, record.tasks) for record in first] == [(record.quality, record.tasks) for record in second]


def test_the_time_limit_begins_anew_with_each_part_of_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(tmp_path, threads=1, time_limit=10)
    clock = iter([0.0, 7.0, 14.0])
    monkeypatch.setattr("quantlab.evaluation.processes.worker_client.time.monotonic", lambda: next(clock))
    events = iter(
        [{"event": "part", "answer": "{}"}, {"event": "part", "answer": "{}"}, {"event": "exit", "status": 0}]
    )
    deadlines: list[float] = []

    def message(deadline: float) -> dict[str, object]:
        deadlines.append(deadline)
        return next(events)

    monkeypatch.setattr(worker, "_message", message)
    heard: list[str] = []
    assert worker._follow(tmp_path / "log", lambda *_: None, heard.append) == 0
    assert (deadlines, heard) == ([10.0, 17.0, 24.0], ["{}", "{}"])


class NoWorker(Worker):
    """A worker that answers no request."""

    def run(self, name: str, *_: object, **__: object) -> NoReturn:  # type: ignore[override]
        raise CellError(f"{name} is not answered")


def check_rows(source: Record, same: Record, other: Record) -> None:
    for record in (source, same, other):
        assert record.failures == ()
        assert record.quality is not None
        assert record.memory is not None
        assert record.speed is not None
        assert record.served is not None
        assert record.served.served_kl.value < 1e-2
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
    assert source.served is not None
    assert source.served.served_kl_to_baseline is None
    losses = [record.served.float32_kl_to_baseline for record in (same, other) if record.served is not None]
    assert losses[0] is not None
    assert losses[0].value < 1e-5, "other batches of the same text: sums in another order"
    assert losses[1] is not None
    assert losses[1].low > 0.1


@pytest.mark.slow
def test_without_its_baseline_a_row_keeps_what_is_its_own(request_: EvaluationRequest) -> None:
    artifacts = tuple(artifact for artifact in request_.artifacts if artifact.variant in {"broken", "same"})
    broken, same = evaluate(dataclasses.replace(request_, baseline="broken", artifacts=artifacts))
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


@pytest.mark.slow
def test_fallbacks_of_the_runtime_are_recorded(
    worker: Worker, suite: Path, model: Path, checkpoints: dict[str, Path]
) -> None:
    for directory, formats in ((model, []), (checkpoints["deepseek_v3"], ["fp8_block"])):
        memory = worker.run("memory", MemoryRequest(directory=directory, suite=suite), Memory, progress=lambda *_: None)
        assert [fallback.format for fallback in memory.expanded] == formats
        assert all(fallback.count and fallback.reasons for fallback in memory.expanded)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_cell_that_takes_too_long_is_stopped(suite: Path, model: Path, tmp_path: Path) -> None:
    request = MemoryRequest(directory=model, suite=suite)
    before = children(os.getpid())
    with Worker(tmp_path / "work", threads=1, time_limit=0.01) as worker:
        with pytest.raises(CellError, match=r"longer than the 0\.01 seconds"):
            worker.run("memory", request, Memory, progress=lambda *_: None)
        assert children(os.getpid()) == before


@pytest.mark.slow
def test_an_unexpected_worker_error_is_reported_with_its_message(
    worker: Worker, suite: Path, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file where a directory is to be made")
    kept = tmp_path / "taken" / "kept"
    request = QualityRequest(directory=model, suite=suite, predictions=kept, role="baseline", key="k")
    with pytest.raises(CellError, match="exit code 1: "):
        worker.run("quality", request, QualityResult, progress=lambda *_: None)


def test_an_answer_that_holds_no_numbers_is_a_cell_that_says_so(worker: Worker, suite: Path, model: Path) -> None:
    """JSON cannot represent numbers that are not finite: they arrive as null, which is not a valid answer."""

    class Endless(Memory):
        load_seconds: float  # type: ignore[assignment]  # the cell answers with something else

    with pytest.raises(CellError, match="its answer is invalid: load_seconds: Input should be a valid number"):
        worker.run("memory", MemoryRequest(directory=model, suite=suite), Endless, progress=lambda *_: None)
    assert worker.run("memory", MemoryRequest(directory=model, suite=suite), Memory, progress=lambda *_: None)


@pytest.mark.slow
def test_a_worker_that_died_between_two_cells_is_started_again(worker: Worker, suite: Path, model: Path) -> None:
    request = MemoryRequest(directory=model, suite=suite)
    before = children(os.getpid())
    worker.run("memory", request, Memory, progress=lambda *_: None)
    for process in children(os.getpid()):
        os.kill(process, signal.SIGKILL)
    assert before
    time.sleep(0.2)  # a signal takes a moment
    assert worker.run("memory", request, Memory, progress=lambda *_: None)


def test_versions_are_told_also_of_packages_that_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package in {"quantlab", "triton"}:
            raise PackageNotFoundError(package)
        return "1.2.3"

    monkeypatch.setattr("quantlab.hardware.version", version)
    found = hardware.versions()
    assert set(found) == {
        "python", "quantlab", "torch", "transformers", "tokenizers", "safetensors", "compressed-tensors", "numpy"
    }  # fmt: skip
    assert found["quantlab"] == VERSION, "of the sources, installed or not"
    assert found["numpy"] == "1.2.3"


@pytest.mark.slow
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
