"""Graphs that optimum-onnx records, with the artifact's integers, judged by onnxruntime; the variable QUANTLAB_ONNXRUNTIME_PYTHON
names the Python of both."""

import json
import os
from pathlib import Path

import pytest

from quantlab.evaluation.engines.judge import Judge, Judging
from quantlab.evaluation.engines.judged import judged_of
from quantlab.exports.export import export
from tests.checkpoints import make_checkpoint
from tests.exports.artifacts import make_artifact

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not os.environ.get("QUANTLAB_ONNXRUNTIME_PYTHON"),
        reason="QUANTLAB_ONNXRUNTIME_PYTHON names no Python with optimum-onnx and onnxruntime",
    ),
]
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = {
    "llama": ("llama", {}, "[{quantize: int4_g32_asym}]", "int4 per 32"),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "intermediate_size": 160}, "[{quantize: int8_weight}]", "int8"),
    "qwen3": ("qwen3", {}, "[{quantize: int4_g128}]", "int4 per 128"),
    "llama3": ("llama", {"rope_scaling": _LLAMA3}, "[{quantize: int4_g32}]", "int4 per 32"),
    "llama3 of transformers 5": (
        "llama",
        {"rope_theta": None, "rope_parameters": {**_LLAMA3, "rope_theta": 500.0}},
        "[{quantize: int4_g128}]",
        "int4 per 128",
    ),
    "dense": ("qwen3", {}, "[{cast: float16}]", None),
}


@pytest.mark.parametrize("case", CASES)
def test_onnxruntime_computes_what_the_artifact_computes(case: str, tmp_path: Path) -> None:
    family, sizes, passes, scheme = CASES[case]
    source = make_checkpoint(tmp_path / "source", family, sizes=sizes)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    artifact = make_artifact(source, passes, tmp_path)  # without tokenizer: judged with random tokens
    export(artifact, "onnx", tmp_path / "onnx", lambda _: None)
    verdict = Judge(judged_of(tmp_path / "onnx"), Judging(tokens=400, greedy_tokens=8)).verdict("onnxruntime")
    assert verdict.verdict == "agrees", verdict.reason
    assert verdict.nll_rms is not None
    assert verdict.nll_rms <= 1e-4
    counted = {str(one.scheme): one.count for one in verdict.modules if one.module == "MatMulNBits"}
    assert sum(counted.values()) == (21 if scheme else 0)
    assert all(name.startswith(scheme or "") for name in counted)
