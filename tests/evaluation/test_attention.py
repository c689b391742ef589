"""Long contexts by implementation of attention: measured cells, cells that are not tried, and the baseline's record."""

import dataclasses
import json
from pathlib import Path
from typing import get_args

import pytest
import torch

from quantlab.errors import RecipeError
from quantlab.evaluation.evaluate import evaluate
from quantlab.evaluation.memory import attention
from quantlab.evaluation.memory.attention import Case, measure_case, needed_bytes
from quantlab.evaluation.processes.messages import AttentionRequest, AttentionResult
from quantlab.evaluation.processes.worker_client import Worker
from quantlab.evaluation.record import AttentionCell, Record
from quantlab.evaluation.request import EvaluatedArtifact, EvaluationRequest
from quantlab.evaluation.speed.models import Layout
from quantlab.evaluation.suite import Implementation, load_suite
from quantlab.runtime.modules.attention import IMPLEMENTATIONS
from tests.runtime.tiny import FAMILIES

CPU = torch.device("cpu")
SHAPE = {"model_type": "deepseek_v3", **FAMILIES["deepseek_v3"]}
SECTION = """
attention:
  implementations: [quantlab_latent_sdpa, eager, flash_attention_2]
  contexts: [16, 32]
  steps: 2
  repeats: 3
"""
no_flash = pytest.mark.skipif(torch.cuda.is_available(), reason="flash attention may be installed")


@pytest.fixture
def attending(suite: Path) -> Path:
    """The suite with an attention section."""
    suite.write_text(suite.read_text() + SECTION)
    return suite


def test_a_suite_knows_every_implementation() -> None:
    assert set(get_args(Implementation)) == set(IMPLEMENTATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["quantlab_latent_sdpa", "sdpa", "eager"])
@pytest.mark.parametrize("family", ["deepseek_v3", "llama"])
def test_a_combination_is_measured(implementation: str, family: str) -> None:
    shape = {"model_type": family, **FAMILIES[family]}
    case = Case(implementation, 200, steps=2, repeats=3, seconds=60)
    found = measure_case(shape, Layout("bfloat16", None), case, CPU)
    assert found.layout == "bfloat16"
    cell = found.cell
    assert (cell.implementation, cell.context, cell.reason) == (implementation, 200, None)
    values = 128 + 16 if family == "deepseek_v3" else 2 * 2 * 32
    assert cell.cache_bytes == 2 * 200 * values * 2, "layers, tokens, values, bytes: of MLA the latents"
    for name in ("prefill_tokens_per_second", "decode_tokens_per_second"):
        rate, (first, third) = getattr(cell, name), cell.quartiles[name]
        assert rate.n == 3
        assert 0 < first <= rate.value <= third
    once = measure_case(shape, Layout("float32", None), Case(implementation, 64), CPU).cell
    assert once.prefill_tokens_per_second is not None
    assert once.prefill_tokens_per_second.n == 1
    assert not once.quartiles


@pytest.mark.slow
def test_scores_take_memory(tmp_path: Path, attending: Path, model: Path) -> None:
    """Each in its own process: eager attention holds 4 heads of 2048 x 2048 scores, fused attention none."""
    shape = SHAPE | {"max_position_embeddings": 64}
    text = attending.read_text().replace(
        "contexts: [16, 32]", f"contexts: [2048]\n  description: x\n  shape: {json.dumps(shape)}"
    )
    attending.write_text(text)
    peaks, decoded = {}, {}
    with Worker(tmp_path / "work", threads=1, time_limit=240) as worker:
        for name in ("quantlab_latent_sdpa", "eager"):
            request = AttentionRequest(directory=model, suite=attending, implementation=name, context=2048)
            cell = worker.run(name, request, AttentionResult, progress=lambda *_: None).cell
            peaks[name], decoded[name] = cell.prefill_peak_bytes, cell.decode_peak_bytes
    expected = needed_bytes(shape, Case("eager", 2048), CPU)
    assert peaks["quantlab_latent_sdpa"] is not None
    assert peaks["eager"] is not None
    assert 4 * 2048**2 * 6 < peaks["eager"] < 1.5 * expected
    assert peaks["quantlab_latent_sdpa"] < 0.5 * peaks["eager"]
    assert decoded["eager"] is None or decoded["eager"] < peaks["eager"]


@no_flash
def test_a_missing_package_is_reported() -> None:
    cell = measure_case(SHAPE, Layout("bfloat16", None), Case("flash_attention_2", 32), CPU).cell
    assert cell.reason == "not tried: the package flash-attn, with CUDA, is not installed"
    assert cell.prefill_peak_bytes is None


def test_cases_that_exceed_free_memory_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "free_bytes", lambda _: 2 * 10**9)
    monkeypatch.setattr(attention, "random_twin", None)
    for name in ("eager", "sdpa"):
        cell = measure_case(SHAPE, Layout("bfloat16", None), Case(name, 32768), CPU).cell
        assert cell.reason == "not tried: about 51.7 GB needed, 2.0 GB free"
    dense = {"model_type": "llama", **FAMILIES["llama"]}
    for shape, name in ((SHAPE, "quantlab_latent_sdpa"), (dense, "sdpa")):
        assert needed_bytes(shape, Case(name, 32768), CPU) < 10**9
    assert needed_bytes(SHAPE, Case("sdpa", 32768), torch.device("cuda")) < 10**9


def test_memory_that_runs_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> AttentionCell:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention, "measure_model", broken)
    assert measure_case(SHAPE, Layout("bfloat16", None), Case("sdpa", 32), CPU).cell.reason == "out of memory"


@pytest.mark.slow
@no_flash
def test_the_record_of_the_baseline_holds_it(tmp_path: Path, attending: Path, model: Path, other_model: Path) -> None:
    artifacts = (
        EvaluatedArtifact("source", "as it is", model, "../model", "0" * 64),
        EvaluatedArtifact("other", "passes", other_model, "artifacts/other", "1" * 64),
    )
    request = EvaluationRequest(
        directory=tmp_path / "run",
        recipe="test",
        recipe_sha256="r",
        suite=attending,
        baseline="source",
        artifacts=artifacts,
    )
    stages: list[tuple[str, int, int]] = []
    source, other = evaluate(request, progress=lambda *stage: stages.append(stage))
    assert other.attention is None
    assert source.attention is not None
    assert ("attention", 6, 6) in stages
    assert (source.attention.twin, source.attention.memory) == ("a twin of nothing", "process")
    assert source.attention.layout in {"float32", "bfloat16"}
    assert [(cell.implementation, cell.context) for cell in source.attention.cells] == [
        (name, context) for name in ("quantlab_latent_sdpa", "eager", "flash_attention_2") for context in (16, 32)
    ]
    reasons = [cell.reason for cell in source.attention.cells]
    assert reasons[:4] == [None] * 4
    assert all(reason is not None and reason.startswith("not tried: the package flash-attn") for reason in reasons[4:])
    assert source.seeds["attention twin"] == 0
    written = (tmp_path / "run/records/source.json").stat().st_mtime_ns
    assert evaluate(request) == [source, other]
    assert (tmp_path / "run/records/source.json").stat().st_mtime_ns == written, "measured once"
    old = json.loads(source.model_dump_json())
    del old["attention"], old["memory"]["peak_memory_of"]
    assert Record.model_validate(old).attention is None, "records of before are records"
    limited = dataclasses.replace(request, reuse=False, time_limit=0.0)
    found = evaluate(limited)[0].attention
    assert found is not None
    assert {cell.reason for cell in found.cells} == {"it took longer than the 0 seconds a cell may take"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("eager, flash_attention_2", "eagre", "did you mean `eager`"),
        ("contexts: [16, 32]", "contexts: []", "empty"),
        ("contexts: [16, 32]", "contexts: [8]", "out of range"),
        ("steps: 2\n  repeats: 3", "steps: 2\n  repeats: 0", "out of range"),
        ("steps: 2\n  repeats: 3", "shape: {hidden_size: 128}", "needs `shape` and `description`"),
    ],
)
def test_mistakes_are_named(attending: Path, old: str, new: str, message: str) -> None:
    assert old in attending.read_text()
    attending.write_text(attending.read_text().replace(old, new))
    with pytest.raises(RecipeError, match=r"tiny\.yaml") as raised:
        load_suite(attending)
    assert message in str(raised.value)


def test_without_a_shape_it_is_measured_on_the_models_own_layers(attending: Path, model: Path) -> None:
    text = attending.read_text()
    start, stop = text.index("speed:"), text.index("attention:")
    attending.write_text(text[:start] + text[stop:])
    assert load_suite(attending).suite.attention_twin == ("", {})
    asked = AttentionRequest(directory=model, suite=attending, implementation="eager", context=16)
    found = attention.measure_attention(asked, lambda *_: None)
    assert found.cell.reason is None
    layers = 2  # one dense, one with experts
    assert found.cell.cache_bytes == layers * 16 * (128 + 16) * 2
