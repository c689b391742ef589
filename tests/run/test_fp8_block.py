"""fp8_block end to end: a BF16 checkpoint in, DeepSeek's FP8 layout out, read by other loaders."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantlab.checkpoint.index import open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.errors import PlanError, RecipeError
from quantlab.evaluation.verify import verify
from quantlab.formats.stored import StoredWeights
from quantlab.plan.compile import compile_plan
from quantlab.plan.model import Plan
from quantlab.recipe.load import load_recipe
from quantlab.run.directory import RunDirectory
from quantlab.run.execute import make_artifacts
from quantlab.runtime.inventory import expanded
from quantlab.runtime.load import load
from tests.checkpoints import FP8, reference_dequantize

EVERYTHING = "targets: [attention, kv_b, dense_mlp, shared_experts, routed_experts]"


def planned(checkpoint: Path, variants: str, root: Path) -> Plan:
    recipe = root / "recipe.yaml"
    recipe.write_text(f"model: {checkpoint}\nvariants:\n{variants}")
    return compile_plan(load_recipe(recipe).recipe, open_checkpoint(checkpoint))


def made(checkpoint: Path, passes: str, root: Path) -> Path:
    plan = planned(checkpoint, f"  fp8: {passes}\n", root)
    directory = RunDirectory(root / "out")
    make_artifacts(plan, load_recipe(root / "recipe.yaml"), directory, lambda _: lambda _: None)
    return directory.artifact("fp8")


def tensors(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return found


def points() -> Tensor:
    """All numbers of e4m3, in order."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return values[values.isfinite()].sort().values


def test_every_block_is_rounded_to_the_nearest_numbers(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    stored, source = (
        tensors(made(checkpoints["llama"], "[{quantize: fp8_block}]", tmp_path)),
        tensors(checkpoints["llama"]),
    )
    grid, quantized = points(), [name for name in stored if name.endswith("_scale_inv")]
    assert len(quantized) == 3 * 7
    for scale_name in quantized[:7]:
        name = scale_name.removesuffix("_scale_inv")
        W, q, scale = source[name].float(), stored[name], stored[scale_name]
        assert (q.dtype, q.shape, scale.dtype) == (torch.float8_e4m3fn, W.shape, torch.float32)
        for i in range(-(-W.shape[0] // 128)):
            for j in range(-(-W.shape[1] // 128)):
                here = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
                block = W[here]
                assert float(scale[i, j]) == pytest.approx(float(block.abs().max()) / 448, rel=1e-6)
                scaled = block / scale[i, j]
                least = (scaled[:, :, None] - grid).abs().amin(2)
                assert torch.allclose((scaled - q[here].float()).abs(), least, atol=1e-4)
    assert sum(name.endswith(".weight") and name.removesuffix(".weight") in "lm_head" for name in stored) == 1
    assert stored["lm_head.weight"].dtype == torch.bfloat16


def test_config_is_the_released_one_with_the_modules_that_stay(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads(
        (made(checkpoints["deepseek_v2"], "[{quantize: fp8_block}]", tmp_path) / "config.json").read_text()
    )
    described = config["quantization_config"]
    assert {key: described[key] for key in FP8} == FP8
    left = described["modules_to_not_convert"]
    assert set(left) == {
        "lm_head",
        *(f"model.layers.{layer}.self_attn.kv_b_proj" for layer in range(3)),
        *(f"model.layers.{layer}.mlp.gate" for layer in (1, 2)),
    }


@pytest.mark.parametrize(
    ("family", "passes"),
    [
        ("llama", "[{quantize: fp8_block, ignore: ['*.layers.1.mlp.*']}]"),
        ("deepseek_v2", "[{quantize: fp8_block, targets: [routed_experts, shared_experts, dense_mlp]}]"),
        ("deepseek_v2", "[{quantize: fp8_block, targets: [dense_mlp]}]"),
    ],
)
def test_transformers_and_the_runtime_read_what_is_meant(
    family: str, passes: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    artifact = made(checkpoints[family], passes, tmp_path)
    verdicts = {check.name: (check.verdict, check.detail) for check in verify(artifact)}
    assert {verdict for verdict, _ in verdicts.values()} == {"ok"}, verdicts
    (fallback,) = expanded(load(artifact))
    assert (fallback.format, fallback.held) == ("fp8_block", "dense")
    assert "activations are not rounded" in fallback.reasons


def test_engines_are_told_of_experts_that_stay(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    config = json.loads(
        (
            made(checkpoints["deepseek_v2"], "[{quantize: fp8_block, targets: [dense_mlp, attention]}]", tmp_path)
            / "config.json"
        ).read_text()
    )
    left = config["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.1.mlp.experts" in left
    assert not [name for name in left if ".experts." in name]
    converted = {
        "model.layers.0.mlp.gate_proj": True,
        "model.layers.1.self_attn.q_proj": True,
        "model.layers.1.self_attn.kv_b_proj": False,
        "model.layers.1.mlp.experts": False,
        "model.layers.1.mlp.shared_experts.up_proj": False,
        "model.layers.2.mlp.gate": False,
        "lm_head": False,
    }
    assert {name: should_convert_module(name, left) for name in converted} == converted


def test_the_layer_of_mtp_is_named_for_every_engine(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads(
        (made(checkpoints["deepseek_v3"], "[{quantize: fp8_block}]", tmp_path) / "config.json").read_text()
    )
    left = config["quantization_config"]["modules_to_not_convert"]
    for layer in ("model.layers.3", "model.decoder"):
        assert {f"{layer}.self_attn.q_a_proj", f"{layer}.mlp.experts"} <= set(left)


def test_an_fp8_source_keeps_its_numbers(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """FP8 values equal the source's byte for byte. Scales may change by half a bfloat16 step, the dtype of reading."""
    source = tensors(checkpoints["deepseek_v3"])
    stored = tensors(made(checkpoints["deepseek_v3"], f"[{{quantize: fp8_block, {EVERYTHING}}}]", tmp_path))
    names = [name for name in stored if name.endswith("_scale_inv")]
    assert len(names) > 60
    for name in names:
        weight = name.removesuffix("_scale_inv")
        assert torch.equal(stored[weight].view(torch.uint8), source[weight].view(torch.uint8)), weight
        assert ((stored[name] / source[name]) - 1).abs().max() <= 2.0**-8
        expected = reference_dequantize(source[weight], source[name]).float()
        found = reference_dequantize(stored[weight], stored[name]).float()
        assert (found - expected).abs().max() <= 2.0**-6 * expected.abs().max()


def test_zeros_of_pruning_stay_and_the_layout_is_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    passes = "[{prune: 0.5}, {quantize: fp8_block}]"
    artifact = made(checkpoints["llama"], passes, tmp_path)
    stored = StoredWeights(Reader(open_checkpoint(artifact)))
    weight = stored.read_dense("model.layers.1.mlp.up_proj.weight", torch.float32)
    assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    plan = planned(checkpoints["llama"], f"  fp8: {passes}\n  plain: [{{cast: float16}}]\n", tmp_path)
    assert [variant.layouts for variant in plan.variants] == [("fp8-blocks",), ()]


def test_mixing_methods_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    mixed = "  mixed: [{quantize: fp8_block, targets: [attention]}, {quantize: int4_g128, targets: [dense_mlp]}]\n"
    with pytest.raises(PlanError, match=r"different quantization methods[^$]*fp8_block \(fp8\)"):
        planned(checkpoints["llama"], mixed, tmp_path)


@pytest.mark.parametrize(
    "algorithm", ["{name: gptq}", "{name: awq}", "{name: rtn, clip: mse}", "{name: rtn, grid: half}"]
)
def test_algorithms_that_choose_integers_are_refused(algorithm: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: m\ncalibration: {{corpus: c.jsonl}}\nvariants:\n  a: [{{quantize: fp8_block, algorithm: {algorithm}}}]\n"
    )
    with pytest.raises(RecipeError, match="chooses integers, and fp8_block has none"):
        load_recipe(recipe)


def test_grids_of_symmetric_integers_are_refused_with_zero_points(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\nvariants:\n  a: [{quantize: int4_g128_asym, algorithm: {name: rtn, grid: signed}}]\n")
    with pytest.raises(RecipeError, match=r"has zero points[^$]*leave `grid` out"):
        load_recipe(recipe)
