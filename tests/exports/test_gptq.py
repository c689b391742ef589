"""The format `gptq`: the artifact's integers unchanged, a description that names every linear, and what it refuses."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab.checkpoint.index import open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.errors import ArtifactError, PlanError
from quantlab.exports.export import export
from quantlab.exports.gptq import TARGET
from quantlab.exports.writers.gptq import _Scales
from quantlab.formats.read_contents import contents_of
from quantlab.formats.stored import StoredWeights
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.plan.compile import compile_plan
from quantlab.recipe.load import load_recipe
from tests.exports.artifacts import make_artifact, weight

VARIANTS = {
    "whole": ("llama", "[{quantize: int4_g128}]"),
    "rows": ("qwen2", "[{quantize: int8_weight}]"),
    "float16": ("qwen3", "[{cast: float16}, {quantize: int4_g64, ignore: ['*.layers.1.mlp.*']}]"),
    "asymmetric": ("llama", "[{quantize: int4_g32_asym}]"),
    "experts": ("deepseek_v3", "[{quantize: int4_g128, targets: [routed_experts]}]"),
    "mixed": (
        "deepseek_v2",
        "[{quantize: int8_weight, targets: [attention]}, {quantize: int4_g64, targets: [routed_experts, shared_experts]}]",
    ),
}


def weights_of(directory: Path) -> StoredWeights:
    return StoredWeights(Reader(open_checkpoint(directory)))


def says(description: dict[str, Any], module: str) -> tuple[int, int, bool] | None:
    """Bits, group size and symmetry of a linear as GPTQModel reads the description; None if it is not quantized."""
    base = {key: description[key] for key in ("bits", "group_size", "sym")}
    for pattern, changes in description.get("dynamic", {}).items():
        if re.match(pattern[2:], module):
            if pattern.startswith("-:"):
                return None
            base |= changes
            break
    return None if module == "lm_head" else (base["bits"], base["group_size"], base["sym"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_integers_are_those_of_the_artifact(variant: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    family, passes = VARIANTS[variant]
    artifact = make_artifact(checkpoints[family], passes, tmp_path)
    notes = export(artifact, "gptq", tmp_path / "gptq", lambda _: None)
    ours, written = weights_of(artifact), weights_of(tmp_path / "gptq")
    names = list(ours.names())
    assert list(written.names()) == names
    description = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert description == json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert description["checkpoint_format"] == ("gptq_v2" if variant == "asymmetric" else "gptq")
    for name in names:
        wanted, found = ours.read(name), written.read(name)
        module = name.removesuffix(".weight")
        if isinstance(wanted, QuantizedMatrix):
            assert isinstance(found, QuantizedMatrix)
            number = ours.format_of(name)
            assert number is not None
            assert torch.equal(found.q, wanted.q)
            assert found.scale.dtype == torch.float16
            assert torch.equal(found.scale.float(), wanted.scale.float())
            assert (found.zero is None) == (wanted.zero is None)
            assert wanted.zero is None or (found.zero is not None and torch.equal(found.zero, wanted.zero))
            assert says(description, module) == (number.bits, number.group_size or -1, number.symmetric)
        else:
            assert isinstance(found, torch.Tensor)
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)
            if re.search(r"(_proj|_mqa|\.gate|eh_proj|lm_head)\.weight$", name):
                assert says(description, module) is None, name
    assert len(notes) == (variant == "asymmetric")


REFUSED = [
    ("[{quantize: int8}]", "quantized activations are not supported"),
    ("[{quantize: fp8_block}]", "is not a 4- or 8-bit integer"),
    ("[{cast: float16}]", "nothing is quantized"),
    (
        "[{quantize: int4_g32_asym, targets: [attention]}, {quantize: int4_g32, targets: [dense_mlp]}]",
        "some linears have zero points and others not",
    ),
]


@pytest.mark.parametrize(("passes", "reason"), REFUSED)
def test_the_plan_refuses_what_it_cannot_express(
    passes: str, reason: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {checkpoints['llama']}\nvariants:\n  a: {{passes: {passes}, format: gptq}}\n")
    with pytest.raises(PlanError, match="the format gptq cannot express the variant") as caught:
        compile_plan(load_recipe(recipe).recipe, open_checkpoint(checkpoints["llama"]))
    assert reason in (caught.value.found or "")
    assert "dense" in (caught.value.fix or "")


def test_the_plan_knows_what_the_artifact_contains(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """What `refuses` sees before the artifact exists is what it sees afterwards."""
    from quantlab.plan.contents import contents_of_variant

    family, passes = VARIANTS["mixed"]
    artifact = make_artifact(checkpoints[family], passes, tmp_path)
    plan = compile_plan(load_recipe(tmp_path / "variant.yaml").recipe, open_checkpoint(checkpoints[family]))
    planned, found = contents_of_variant(plan, plan.variants[0]), contents_of(open_checkpoint(artifact))
    assert planned.weights == found.weights
    assert planned.config == found.config


def test_the_key_of_an_artifact_does_not_depend_on_its_formats(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    keys = set()
    for formats in ("", ", format: gptq", ", format: [compressed-tensors, dense]"):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"model: {checkpoints['llama']}\nvariants:\n  a: {{passes: [{{quantize: int4_g128}}]{formats}}}\n"
        )
        (variant,) = compile_plan(load_recipe(recipe).recipe, open_checkpoint(checkpoints["llama"])).variants
        keys.add(variant.recipe_key)
    assert len(keys) == 1


def test_scales_that_float16_rounds_are_counted_and_those_it_loses_are_refused() -> None:
    one = weight("m.weight", (1, 4))
    scales = _Scales()
    exact = torch.tensor([[1.0, 0.0078125]], dtype=torch.bfloat16)
    assert torch.equal(scales.to_float16(one, exact).float(), exact.float())
    scales.to_float16(one, torch.tensor([[1.0078125 * 2**-18, 1.0]], dtype=torch.bfloat16))
    assert (scales.counts["all"], scales.counts["rounded"]) == (4, 1)
    for lost in (1e-9, 1e6):
        with pytest.raises(ArtifactError, match="outside the range of float16"):
            scales.to_float16(one, torch.tensor([[lost, 1.0]], dtype=torch.bfloat16))


def test_rows_that_do_not_fill_a_word_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    contents = contents_of(open_checkpoint(make_artifact(checkpoints["llama"], "[{quantize: int4_g128}]", tmp_path)))
    narrow = dataclasses.replace(contents.quantized[0], shape=(12, 128))
    assert "12 rows do not fill words of 8" in (TARGET.refuses(dataclasses.replace(contents, weights=(narrow,))) or "")
