"""GPTQModel's own loader on exports, against quantlab's runtime on the artifacts; the variable QUANTLAB_GPTQMODEL_PYTHON names its Python."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantlab.exports.export import export
from quantlab.runtime.load import load
from tests.exports.artifacts import make_artifact, with_tokenizer

PYTHON = os.environ.get("QUANTLAB_GPTQMODEL_PYTHON", "")
SCRIPT = Path(__file__).parents[2] / "quantlab" / "evaluation" / "engines" / "scripts" / "gptqmodel.py"
WEIGHT_ONLY = 1e-4
"""Nats per token: both programs compute in float32 with the same weights, so only the order of sums differs."""

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not PYTHON, reason="QUANTLAB_GPTQMODEL_PYTHON names no Python with GPTQModel"),
]


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 384, (48,), generator=generator).tolist() for _ in range(3)]


def judged(model: Path, root: Path) -> tuple[dict[str, Tensor], dict]:
    request = {
        "model": str(model), "dtype": "float32", "threads": 2, "documents": documents(),
        "greedy": None, "speed": None, "probes": None, "options": {},
    }  # fmt: skip
    (root / "request.json").write_text(json.dumps(request))
    (root / "result").mkdir()
    command = [PYTHON, str(SCRIPT), str(root / "request.json"), str(root / "result")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(root / "result" / "result.safetensors"), json.loads((root / "result" / "result.json").read_text())


def expected(artifact: Path) -> Tensor:
    model, found = load(artifact, dtype=torch.float32), []
    with torch.inference_mode():
        for document in documents():
            ids = torch.tensor([document])
            logs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            found.append(-logs.gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize(
    ("family", "passes", "modules"),
    [
        ("llama", "[{quantize: int4_g128}]", 21),
        ("llama", "[{quantize: int4_g32_asym}]", 21),
        ("llama", "[{quantize: int8_weight}]", 21),
        ("deepseek_v2", "[{quantize: int4_g64, targets: [routed_experts]}]", 48),
    ],
)
def test_gptqmodel_computes_what_the_artifact_computes(
    family: str, passes: str, modules: int, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = with_tokenizer(checkpoints[family], tmp_path / "checkpoint")  # its loader wants one
    artifact = make_artifact(checkpoint, passes, tmp_path)
    export(artifact, "gptq", tmp_path / "gptq", lambda _: None)
    found, report = judged(tmp_path / "gptq", tmp_path)
    assert report["missing"] == report["unexpected"] == []
    assert sum(one["count"] for one in report["modules"] if one["scheme"]) == modules
    wanted = expected(artifact)
    assert (found["nll"] - wanted).square().mean().sqrt() <= WEIGHT_ONLY
