"""The whole tool on tiny checkpoints: artifacts are loaded with other libraries and compared number by number."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantlab.checkpoint.index import open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.formats.stored import StoredWeights
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.plan.compile import compile_plan
from quantlab.recipe.load import load_recipe
from quantlab.run.directory import RunDirectory
from quantlab.run.execute import make_artifacts
from tests.checkpoints import reference_dequantize

VARIANTS = """\
  fp16: [{cast: float16}]
  int8: [{quantize: int8}]
  int8_weight: [{quantize: int8_weight}]
  w4a16: [{quantize: int4_g128, algorithm: {name: rtn, clip: mse}}]
  pruned: [{cast: float16}, {prune: 0.08}]
  pruned-w4a16: [{prune: 0.3}, {quantize: int4_g128}]
"""
EXPERTS = "  w4a16-experts: [{quantize: int4_g128, targets: [routed_experts]}]\n"
FAMILIES = ["llama", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3"]


def run(recipe: Path, out: Path) -> RunDirectory:
    loaded = load_recipe(recipe)
    plan = compile_plan(loaded.recipe, open_checkpoint(loaded.model))
    directory = RunDirectory(out)
    make_artifacts(plan, loaded, directory, lambda _: lambda _: None)
    return directory


@pytest.fixture(scope="module")
def runs(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    root = tmp_path_factory.mktemp("runs")
    results = {}
    for family in FAMILIES:
        recipe = root / f"{family}.yaml"
        experts = EXPERTS if family.startswith("deepseek") else ""
        recipe.write_text(f"model: {checkpoints[family]}\nvariants:\n{VARIANTS}{experts}")
        results[family] = run(recipe, root / family)
    return results


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory, read by the safetensors library."""
    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def dense_source(directory: Path) -> dict[str, Tensor]:
    """The source with FP8 blocks dequantized by the tests' oracle."""
    tensors = tensors_of(directory)
    return {
        name: reference_dequantize(tensor, tensors[name + "_scale_inv"])
        if tensor.dtype == torch.float8_e4m3fn
        else tensor
        for name, tensor in tensors.items()
        if not name.endswith("_scale_inv")
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_fp16_is_the_source_rounded_once(
    family: str, runs: dict[str, RunDirectory], checkpoints: dict[str, Path]
) -> None:
    source, made = dense_source(checkpoints[family]), tensors_of(runs[family].artifact("fp16"))
    assert set(made) == set(source)
    for name, tensor in source.items():
        expected = tensor if name.endswith("e_score_correction_bias") else tensor.to(torch.float16)
        assert torch.equal(made[name], expected), name


@pytest.mark.parametrize("family", FAMILIES)
def test_untargeted_tensors_are_copied_bit_for_bit(
    family: str, runs: dict[str, RunDirectory], checkpoints: dict[str, Path]
) -> None:
    source = dense_source(checkpoints[family])
    for variant in ("int8", "w4a16", "pruned-w4a16"):
        made = tensors_of(runs[family].artifact(variant))
        untouched = [name for name in source if name in made and made[name].dtype != torch.int8]
        assert any("embed_tokens" in name for name in untouched)
        if family == "deepseek_v3":
            assert {
                f"model.layers.3.{name}.weight" for name in ("eh_proj", "self_attn.q_a_proj", "mlp.experts.7.up_proj")
            } <= set(untouched)
        for name in untouched:
            assert torch.equal(made[name], source[name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("variant", "bound"), [("int8", 0.01), ("int8_weight", 0.01), ("w4a16", 0.12)])
def test_quantized_weights_are_near_the_source(
    family: str, variant: str, bound: float, runs: dict[str, RunDirectory], checkpoints: dict[str, Path]
) -> None:
    source = dense_source(checkpoints[family])
    stored = StoredWeights(Reader(open_checkpoint(runs[family].artifact(variant))))
    quantized = [name for name in stored.names() if isinstance(stored.read(name), QuantizedMatrix)]
    assert len(quantized) >= 20
    for name in quantized:
        weight = stored.read_dense(name, torch.float32)
        assert ((weight - source[name].float()).norm() / source[name].float().norm()).item() < bound


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_zeros_survive_quantization(
    family: str, runs: dict[str, RunDirectory], checkpoints: dict[str, Path]
) -> None:
    source = dense_source(checkpoints[family])
    pruned = tensors_of(runs[family].artifact("pruned"))
    stored = StoredWeights(Reader(open_checkpoint(runs[family].artifact("pruned-w4a16"))))
    for name in stored.names():
        if stored.format_of(name) is None:
            continue
        zeros = (pruned[name] == 0).float().mean().item()
        assert zeros == pytest.approx(0.08, abs=0.003)
        count = int(0.3 * source[name].numel())
        threshold = source[name].abs().flatten().kthvalue(count).values
        removed = source[name].abs() < threshold
        assert not stored.read_dense(name, torch.float32)[removed].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_config_is_the_original_with_two_fields_patched(
    family: str, runs: dict[str, RunDirectory], checkpoints: dict[str, Path]
) -> None:
    original = json.loads((checkpoints[family] / "config.json").read_text())
    original.pop("quantization_config", None)
    for variant, dtype, quantized in (
        ("fp16", "float16", False),
        ("w4a16", "bfloat16", True),
        ("pruned", "float16", False),
    ):
        config = json.loads((runs[family].artifact(variant) / "config.json").read_text())
        assert (config.pop("quantization_config", None) is not None) == quantized
        assert config == original | {"torch_dtype": dtype}


@pytest.mark.parametrize("family", FAMILIES)
def test_manifest_and_companions(family: str, runs: dict[str, RunDirectory]) -> None:
    for artifact in (runs[family].path / "artifacts").iterdir():
        manifest = json.loads((artifact / "manifest.json").read_text())
        assert set(manifest["files"]) == {path.name for path in artifact.iterdir()} - {"manifest.json", "README.md"}
        for name, record in manifest["files"].items():
            assert hashlib.sha256((artifact / name).read_bytes()).hexdigest() == record["sha256"]
        assert {"tokenizer_config.json", "generation_config.json"} <= set(manifest["files"])
        card = (artifact / "README.md").read_text()
        for needed in (
            "## Measurements",
            "## Loading",
            "## Engines",
            "| transformers 5",
            "| vLLM 0",
            "| SGLang 0",
            "## Limits",
            "## Recipe",
        ):
            assert needed in card
        assert manifest["recipe"]["text"].strip() in card
        assert not list(artifact.glob("*.tmp"))
    assert not (runs[family].path / ".work").exists()


LOADABLE = ["fp16", "int8_weight", "w4a16", "pruned-w4a16"]


@pytest.mark.parametrize(
    ("family", "variant"),
    [(family, variant) for family in FAMILIES for variant in LOADABLE]
    + [("deepseek_v2", "w4a16-experts"), ("deepseek_v3", "w4a16-experts")],
)
def test_transformers_loads_it_bit_for_bit(
    family: str, variant: str, runs: dict[str, RunDirectory], tmp_path: Path
) -> None:
    """Logits of the artifact equal those of its own dequantized weights, loaded as a plain checkpoint."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    artifact = runs[family].artifact(variant)
    stored = StoredWeights(Reader(open_checkpoint(artifact)))
    dtype = torch.float16 if variant == "fp16" else torch.bfloat16
    dense = {
        name: weight.dequantize(dtype) if isinstance(weight := stored.read(name), QuantizedMatrix) else weight
        for name in stored.names()
    }
    save_file(dense, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((artifact / "config.json").read_text())
    config.pop("quantization_config", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    logits = []
    for directory in (artifact, tmp_path):
        model, info = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
        assert not info["missing_keys"]
        with torch.inference_mode():
            logits.append(model(torch.arange(64).view(2, 32)).logits)
    assert torch.equal(logits[0], logits[1])
    assert logits[0].float().std() > 0.05
