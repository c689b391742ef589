"""Evaluation on a GPU through the worker process, compared with records made on the CPU. Skipped without a GPU."""

import json
from pathlib import Path

import pytest
import torch

from quantlab.evaluation.evaluate import evaluate
from quantlab.evaluation.record import Record
from quantlab.evaluation.request import EvaluatedArtifact, EvaluationRequest
from quantlab.recipe.schemes import SCHEMES
from quantlab.runtime.device import find_device, name_of
from tests.evaluation.conftest import TINY_SUITE, write_corpus, write_tokenizer
from tests.runtime.tiny import quantize, write_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ATTENTION = """
attention:
  implementations: [eager, quantlab_latent_sdpa]
  contexts: [64]
  repeats: 3
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    directory = tmp_path_factory.mktemp("suite")
    write_corpus(directory / "heldout.jsonl")
    shape = (source / "config.json").read_text().replace("\n", " ")
    path = directory / "tiny.yaml"
    path.write_text(TINY_SUITE.format(corpus="heldout.jsonl", shape=shape) + ATTENTION)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("models") / "source", "deepseek_v2", vocab_size=320)
    write_tokenizer(directory)
    return directory


def evaluated(directory: Path, source: Path, suite: Path, device: str) -> dict[str, Record]:
    artifact = directory / "w4a16"
    if not artifact.is_dir():
        quantize(source, artifact, SCHEMES["int4_g128"])
    found = find_device(device)
    artifacts = (
        EvaluatedArtifact("source", "as it is", source, "../source", "0" * 64),
        EvaluatedArtifact("same", "as it is", source, "../source", "1" * 64),
        EvaluatedArtifact("w4a16", "int4_g128 (rtn)", artifact, "artifacts/w4a16", "2" * 64),
    )
    request = EvaluationRequest(
        directory=directory / device,
        recipe="test",
        recipe_sha256="r",
        suite=suite,
        baseline="source",
        artifacts=artifacts,
        device=str(found),
        gpu=name_of(found),
    )
    records = {record.variant: record for record in evaluate(request)}
    assert not [failure for record in records.values() for failure in record.failures]
    return records


@pytest.fixture(scope="module")
def records(
    tmp_path_factory: pytest.TempPathFactory, source: Path, suite: Path
) -> tuple[dict[str, Record], dict[str, Record]]:
    """Records of the GPU and of the CPU."""
    directory = tmp_path_factory.mktemp("runs")
    return evaluated(directory, source, suite, "cuda"), evaluated(directory, source, suite, "cpu")


Both = tuple[dict[str, Record], dict[str, Record]]


def test_quality_is_that_of_the_cpu(records: Both) -> None:
    gpu, cpu = records
    for variant in ("source", "w4a16"):
        found, expected = gpu[variant].quality, cpu[variant].quality
        assert found is not None
        assert expected is not None
        assert found.perplexity.n == expected.perplexity.n
        assert found.perplexity.value == pytest.approx(expected.perplexity.value, rel=1e-3)
        assert found.next_token_accuracy.value == pytest.approx(expected.next_token_accuracy.value, abs=5e-3)
    lost, truth = gpu["w4a16"].quality, cpu["w4a16"].quality
    assert lost is not None
    assert truth is not None
    assert lost.kl_to_baseline is not None
    assert truth.kl_to_baseline is not None
    assert lost.kl_to_baseline.value == pytest.approx(truth.kl_to_baseline.value, rel=0.02)
    assert lost.divergence is not None
    assert truth.divergence is not None
    assert lost.divergence.layer_errors.keys() == truth.divergence.layer_errors.keys()
    for name, one in truth.divergence.layer_errors.items():
        assert lost.divergence.layer_errors[name].value == pytest.approx(one.value, rel=0.02)
    same = gpu["same"].quality
    assert same is not None
    assert same.kl_to_baseline is not None
    assert same.kl_to_baseline.value == 0, (
        "the baseline's logits are computed again by the same operation on the same bits"
    )


def test_memory_is_that_of_the_allocator(records: Both) -> None:
    gpu, cpu = (each["w4a16"].memory for each in records)
    assert gpu is not None
    assert cpu is not None
    assert (gpu.peak_memory_of, cpu.peak_memory_of) == ("cuda", "process")
    assert gpu.artifact_bytes == cpu.artifact_bytes
    assert gpu.fp16_weights_bytes == cpu.fp16_weights_bytes
    assert gpu.weights_bytes == pytest.approx(cpu.weights_bytes, rel=0.1)
    assert gpu.kv_cache_bytes_per_token == cpu.kv_cache_bytes_per_token
    assert gpu.weights_bytes < gpu.peak_memory_bytes < gpu.weights_bytes + 2**28, "no libraries, no reserve"
    assert gpu.load_seconds.value > 0


def test_speed_is_that_of_captured_steps_on_the_named_gpu(records: Both) -> None:
    gpu, cpu = (each["w4a16"] for each in records)
    name = torch.cuda.get_device_name()
    assert name in gpu.hardware
    assert name not in cpu.hardware
    assert gpu.speed is not None
    assert gpu.speed.twin.endswith(f"{name}, captured, fused steps")
    assert all(found.value > 0 for found in gpu.speed.decode_tokens_per_second.values())
    assert set(gpu.speed.decode_over_fp16) == {"1", "2"}


def test_served_logits_are_near_float32(records: Both) -> None:
    for variant in ("source", "w4a16"):
        found = records[0][variant].served
        assert found is not None
        assert (found.served_dtype, found.served_steps) == ("bfloat16", "captured, fused steps")
        assert found.served_kl.value < 1e-2
        assert found.served_top1_agreement.value > 0.9
    assert records[0]["source"].served.served_kl_to_baseline is None  # type: ignore[union-attr]
    assert records[0]["same"].served.float32_kl_to_baseline.value < 1e-4  # type: ignore[union-attr]


def test_attention_is_measured_above_the_weights(records: Both) -> None:
    found = records[0]["source"].attention
    assert found is not None
    assert found.memory == "cuda"
    cells = {cell.implementation: cell for cell in found.cells}
    assert set(cells) == {"eager", "quantlab_latent_sdpa"}
    for cell in cells.values():
        assert cell.reason is None, cell.reason
        assert cell.prefill_peak_bytes is not None
        assert cell.cache_bytes is not None
        assert cell.prefill_peak_bytes >= cell.cache_bytes > 0
        assert cell.decode_peak_bytes is not None
        assert cell.decode_peak_bytes >= cell.cache_bytes
        assert cell.prefill_tokens_per_second is not None
        assert cell.prefill_tokens_per_second.n == 3


def test_records_of_another_device_are_not_kept(source: Path, suite: Path, tmp_path: Path) -> None:
    first = evaluated(tmp_path, source, suite, "cuda")
    written = tmp_path / "cuda" / "records" / "w4a16.json"
    before = written.stat().st_mtime_ns
    again = evaluated(tmp_path, source, suite, "cuda")
    assert again == first
    assert written.stat().st_mtime_ns == before
    told = json.loads(written.read_text())
    written.write_text(json.dumps(told | {"hardware": told["hardware"].partition("; ")[2]}))
    assert evaluated(tmp_path, source, suite, "cuda")["w4a16"].hardware == told["hardware"]
