"""transformers does what its rules say: it refuses, misreads or needs an argument for small artifacts of each kind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab.checkpoint.index import open_checkpoint
from quantlab.evaluation.verify import _logits_of_transformers
from quantlab.exports.writers.dense import write_expanded
from quantlab.formats.engine_rules.table import ENGINES, RULES
from quantlab.formats.stored import StoredWeights
from quantlab.plan.compile import compile_plan
from quantlab.plan.model import VariantPlan
from quantlab.recipe.load import load_recipe
from quantlab.run.directory import RunDirectory
from quantlab.run.execute import make_artifacts
from tests import checkpoints as tiny

pytestmark = pytest.mark.slow

BY_LAYER = (
    "{quantize: int4_g64, targets: [routed_experts], ignore: ['*.layers.1.*']}, "
    "{quantize: int4_g128, targets: [routed_experts], ignore: ['*.layers.2.*']}"
)
REFUSED = {
    "transformers-zero-point-experts": ("deepseek_v3", "{quantize: int4_g128_asym}"),
    "transformers-int8-experts": ("deepseek_v3", "{quantize: int8}"),
    "transformers-unquantized-experts": ("deepseek_v2", "{quantize: int4_g128, targets: [attention]}"),
    "transformers-expert-formats": ("deepseek_v2", BY_LAYER),
    "transformers-zero-points-mixed": (
        "llama",
        "{quantize: int4_g128_asym, targets: [attention]}, {quantize: int4_g64, targets: [dense_mlp]}",
    ),
    "transformers-ragged-fp8": ("ragged", "{quantize: fp8_block, targets: [dense_mlp]}"),
}


def make(root: Path, family: str, passes: str) -> tuple[VariantPlan, Path]:
    """The plan and the artifact of one variant of a tiny checkpoint."""
    checkpoint = root / family
    if not checkpoint.exists():
        tiny.make_checkpoint(checkpoint, family)
    recipe = root / f"{family}.yaml"
    recipe.write_text(f"model: {checkpoint}\nvariants:\n  it: [{passes}]\n")
    loaded = load_recipe(recipe)
    directory = RunDirectory(root / f"{family}-out")
    plan = compile_plan(loaded.recipe, open_checkpoint(checkpoint))
    make_artifacts(plan, loaded, directory, lambda _: lambda _: None)
    return plan.variants[0], directory.artifact("it")


def rules_of(variant: VariantPlan) -> set[str]:
    """Names of transformers' rules that apply to a variant."""
    (found,) = (verdict for verdict in variant.engines if verdict.engine.name == "transformers")
    return {one.rule.name for one in found.objections}


def logits(directory: Path, dequantize: str | None = None) -> torch.Tensor:
    return _logits_of_transformers(directory, open_checkpoint(directory), dequantize=dequantize, dtype=torch.bfloat16)


def expected(artifact: Path, root: Path) -> torch.Tensor:
    """Logits of the artifact's own dequantized weights."""
    from quantlab.checkpoint.reader import Reader

    plain = root / "plain"
    plain.mkdir()
    write_expanded(StoredWeights(Reader(open_checkpoint(artifact))), plain)
    return logits(plain)


def with_config(monkeypatch: pytest.MonkeyPatch, name: str, **changed: Any) -> None:
    """Add a tiny llama with other sizes."""
    monkeypatch.setitem(tiny.CONFIGS, name, tiny.CONFIGS["llama"] | changed)


def test_the_rules_are_of_the_installed_version() -> None:
    """Where another version is installed, the tests below say whether its rules still hold."""
    import transformers

    read, installed = (version.split(".")[0] for version in (ENGINES["transformers"].version, transformers.__version__))
    assert read == installed


@pytest.mark.parametrize("name", REFUSED)
def test_transformers_refuses(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_config(monkeypatch, "ragged", intermediate_size=257)
    variant, artifact = make(tmp_path, *REFUSED[name])
    assert name in rules_of(variant)
    method = json.loads((artifact / "config.json").read_text())["quantization_config"]["quant_method"]
    for dequantize in (None, method):
        with pytest.raises((RuntimeError, ValueError)):
            logits(artifact, dequantize)


def test_transformers_needs_an_argument_for_zero_points(tmp_path: Path) -> None:
    variant, artifact = make(tmp_path, "llama", "{quantize: int4_g128_asym}")
    assert "transformers-zero-points" in rules_of(variant)
    with pytest.raises(RuntimeError):
        logits(artifact)
    assert torch.equal(logits(artifact, "compressed-tensors"), expected(artifact, tmp_path))


def test_transformers_misreads_ragged_blocks_that_divide_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_config(monkeypatch, "even", intermediate_size=192)
    variant, artifact = make(tmp_path, "even", "{quantize: fp8_block, targets: [dense_mlp]}")
    assert "transformers-smaller-fp8" in rules_of(variant)
    reference = expected(artifact, tmp_path)
    assert (logits(artifact, "fp8") - reference).norm() > 0.01 * reference.norm()


def test_every_seen_rule_of_transformers_is_seen_here() -> None:
    seen = {rule.name for rule in RULES if rule.engine == "transformers" and rule.seen}
    elsewhere = {"transformers-zero-points", "transformers-smaller-fp8", "transformers-expands"}
    elsewhere.add("transformers-fp8-block-experts")  # no artifact has them: tests/exports/test_compressed_tensors.py
    assert seen == {*REFUSED, *elsewhere}
