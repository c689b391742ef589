"""The script that judges with vLLM: its accounts of loading without vLLM, and whole runs where its environment is."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlab.evaluation.engines.scripts import vllm as script
from quantlab.evaluation.engines.scripts import vllm_products as products
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.packing import pack_int32
from quantlab.runtime.load import load
from tests.engines.models import make_model, make_variants

PYTHON = os.environ.get("QUANTLAB_VLLM_PYTHON")
NATS = 1e-4  # between two programs in float32 on the same weights


def loaded(pairs: list[tuple[str, Tensor]], parameter: Tensor, take: Any) -> tuple[list[str], set[str]]:
    given: list[str] = []
    taken: set[str] = set()
    for name, tensor in script.named(pairs, given, taken):
        take(name, tensor, parameter)
    return given, taken


def test_a_tensor_is_taken_when_it_reaches_a_parameter() -> None:
    parameter = torch.empty(4, 2)

    def take(name: str, tensor: Tensor, parameter: Tensor) -> None:
        if name == "first":
            parameter.narrow(0, 0, 2).copy_(tensor.to(torch.float32))
        elif name == "second":
            parameter[2:] = torch.cat([tensor[:1], tensor[1:]])
        elif name == "looked at":
            assert tensor.shape == (2, 2)
            assert tensor.sum() == 4

    pairs = [(name, torch.ones(2, 2, dtype=torch.float16)) for name in ("first", "second", "looked at")]
    given, taken = loaded(pairs, parameter, take)
    assert given == ["first", "second", "looked at"]
    assert taken == {"first", "second"}
    assert torch.equal(parameter, torch.ones(4, 2))
    assert type(parameter) is torch.Tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.int8])
def test_poison_stays_where_nothing_is_written(dtype: torch.dtype) -> None:
    parameter = torch.zeros(4, 8).to(dtype)
    script.poison(parameter)
    assert script.is_poisoned(parameter)
    parameter[:3] = torch.ones(3, 8).to(dtype)
    assert script.is_poisoned(parameter)
    parameter[3] = torch.ones(8).to(dtype)
    assert not script.is_poisoned(parameter)


def test_a_single_smallest_integer_is_a_weight() -> None:
    weights = torch.ones(4, 8, dtype=torch.int8)
    weights[1, 3] = -128
    assert not script.is_poisoned(weights)


def test_parts_of_fused_linears_are_found() -> None:
    modules = {"model.layers.0.mlp.gate_up_proj": None, "model.layers.0.mlp.down_proj": None}
    packed = {"gate_up_proj": ["gate_proj", "up_proj"]}
    assert script.place_of("model.layers.0.mlp.up_proj", modules, packed) == ("model.layers.0.mlp.gate_up_proj", 1)
    assert script.place_of("model.layers.0.mlp.down_proj", modules, packed) == ("model.layers.0.mlp.down_proj", None)
    assert script.place_of("model.layers.0.mlp.experts.0.up_proj", modules, packed) == (None, None)


@pytest.mark.parametrize("bits", [4, 8])
def test_plain_products_expand_what_quantlab_packs(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    half = 1 << (bits - 1)
    q = torch.randint(-half, half, (6, 256), generator=generator).to(torch.int8)
    scale = torch.rand(6, 2, generator=generator) + 0.5
    numbers = products.unpacked(pack_int32(q, bits=bits), bits, 1)
    assert torch.equal(
        products.dequantized(numbers, scale, half), QuantizedMatrix(q, scale, bits).dequantize(torch.float32)
    )


def test_zero_points_are_packed_along_rows() -> None:
    zero = torch.randint(0, 16, (16, 2), generator=torch.Generator().manual_seed(0))
    words = pack_int32((zero - 8).to(torch.int8).t().contiguous(), bits=4).t()
    assert torch.equal(products.unpacked(words, 4, 0), zero.float())


def ask(directory: Path, model: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run the script in vLLM's environment."""
    documents = torch.randint(5, 500, (3, 48), generator=torch.Generator().manual_seed(0)).tolist()
    request = {"model": str(model), "dtype": "float32", "threads": 2, "documents": documents, "greedy": None, "speed": None, "probes": None, "options": {}}  # fmt: skip
    (directory / "request.json").write_text(json.dumps({**request, **more}))
    assert PYTHON is not None
    command = [PYTHON, script.__file__, str(directory / "request.json"), str(directory / "result")]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


needs_vllm = pytest.mark.skipif(
    PYTHON is None, reason="QUANTLAB_VLLM_PYTHON does not name the Python of an environment with vLLM"
)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vllm")
    return make_variants(make_model(root / "model", "llama"), root / "made", ("fp16", "int4_g128"))


@needs_vllm
@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_vllm_agrees_on_a_dense_artifact(artifacts: dict[str, Path], tmp_path: Path) -> None:
    down = "model.layers.1.mlp.down_proj"
    inputs = torch.randn(5, 512, generator=torch.Generator().manual_seed(1))
    save_file({down: inputs, "no.such": inputs.clone()}, tmp_path / "probes.safetensors")
    done = ask(tmp_path, artifacts["fp16"], probes=str(tmp_path / "probes.safetensors"), greedy={"prompts": [[5, 6, 7]], "tokens": 6}, speed={"prefill": 16, "decode": 4})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "result" / "result.json").read_text())
    assert report["dtype"] == "float32"
    assert not report["missing"]
    assert not report["unexpected"]
    assert not report["replaced"]
    assert report["prefill_tokens_per_second"] > 0
    assert report["decode_tokens_per_second"] > 0
    assert "model.layers.0.self_attn.q_proj" in report["unquantized"]
    assert report["notes"] == ["no linear of this name to probe: no.such"]
    tensors = load_file(tmp_path / "result" / "result.safetensors")
    model = load(artifacts["fp16"], dtype=torch.float32)
    assert tensors["greedy"].shape == (1, 6)
    shards = [load_file(path) for path in artifacts["fp16"].glob("*.safetensors")]
    (weight,) = (shard[f"{down}.weight"] for shard in shards if f"{down}.weight" in shard)
    torch.testing.assert_close(tensors[f"probe.{down}"], inputs @ weight.float().t(), rtol=1e-4, atol=1e-4)
    compare(tmp_path, model)


@needs_vllm
@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_vllm_agrees_on_packed_integers_or_says_that_it_cannot(artifacts: dict[str, Path], tmp_path: Path) -> None:
    """Without its kernel vLLM is not here; then plain torch may multiply what vLLM loaded."""
    done = ask(tmp_path, artifacts["int4_g128"])
    replaced = done.returncode == script.NOT_HERE
    if replaced:
        assert done.stdout.splitlines()[-1].startswith("NOT HERE: ")
        done = ask(tmp_path, artifacts["int4_g128"], options={"replace": True})
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "result" / "result.json").read_text())
    assert bool(report["replaced"]) == replaced
    assert not report["missing"]
    assert not report["unexpected"]
    assert any(kind["scheme"] == "CompressedTensorsWNA16" for kind in report["modules"])
    compare(tmp_path, load(artifacts["int4_g128"], dtype=torch.float32))


def compare(directory: Path, model: torch.nn.Module) -> None:
    """vLLM's numbers against quantlab's runtime on the same tokens."""
    documents = json.loads((directory / "request.json").read_text())["documents"]
    with torch.inference_mode():
        logits = [model(input_ids=torch.tensor([ids])).logits[0, :-1].float() for ids in documents]
    nll = torch.cat([torch.nn.functional.cross_entropy(x, torch.tensor(ids[1:]), reduction="none") for x, ids in zip(logits, documents, strict=True)])  # fmt: skip
    tensors = load_file(directory / "result" / "result.safetensors")
    assert (tensors["nll"] - nll).pow(2).mean().sqrt() < NATS
    top = torch.cat([x.argmax(dim=-1) for x in logits])
    assert (tensors["top"] == top).float().mean() > 0.99
