"""The shipped recipes, planned from headers with the true shapes of their models."""

from pathlib import Path

import pytest

from quantlab.checkpoint.index import open_checkpoint
from quantlab.plan.compile import compile_plan
from quantlab.plan.model import Plan
from quantlab.recipe.load import load_recipe
from quantlab.texts.locate import Commits, with_located_text
from tests.true_shapes import CODER_7B, DISTILL_7B, DISTILL_8B, LLM_7B, QWEN3_8B, V2_LITE, V3, write_headers

pytestmark = pytest.mark.slow
RECIPES = Path(__file__).parents[2] / "recipes"
MODELS = {
    "deepseek-v3": (V3, 163),
    "deepseek-r1": (V3, 163),
    "deepseek-v2-lite": (V2_LITE, 4),
    "deepseek-r1-0528-qwen3-8b": (QWEN3_8B, 2),
    "deepseek-r1-distill-qwen-7b": (DISTILL_7B, 2),
    "deepseek-r1-distill-llama-8b": (DISTILL_8B, 2),
    "deepseek-llm-7b": (LLM_7B, 2),
    "deepseek-coder-6.7b": (CODER_7B, 2),
}


def test_every_recipe_is_planned_here() -> None:
    assert {path.stem for path in RECIPES.rglob("*.yaml") if load_recipe(path).hub_id is not None} == set(MODELS)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    directory = tmp_path_factory.mktemp("shapes")
    plans: dict[str, Plan] = {}
    for name, (config, shards) in MODELS.items():
        place = directory / ("v3" if config is V3 else name)  # R1 has the shapes of V3
        if not place.exists():
            write_headers(place, config, shards=shards, fp8=config is V3)
        checkpoint = open_checkpoint(place)
        recipe = with_located_text(load_recipe(RECIPES / f"{name}.yaml"), place, Commits(directory / "run"))
        plans[name] = compile_plan(recipe.recipe, checkpoint, corpus_sha256=recipe.corpus_sha256())
    return plans


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_fits_its_model(plans: dict[str, Plan], name: str) -> None:
    plan = plans[name]
    for variant in plan.variants:
        assert len({entry.tensor for step in variant.steps for entry in step.ledger()}) == len(plan.checkpoint.tensors)
        if "w4a16" in variant.name:
            quantized = [step for step in variant.steps if step.quantize and step.quantize.quantize.startswith("int4")]
            bits = 8 * sum(step.output_bytes for step in quantized) / sum(step.source.elements for step in quantized)
            assert bits == pytest.approx(4.25 if name == "deepseek-v2-lite" else 4.125, abs=0.001)
            assert variant.calibration is not None
        assert variant.tensor_parallel[0] == 1


def test_r1_differs_from_v3_by_its_name_and_text_alone() -> None:
    v3, r1 = (load_recipe(RECIPES / f"{name}.yaml").recipe for name in ("deepseek-v3", "deepseek-r1"))
    assert r1.model == "deepseek-ai/DeepSeek-R1-0528"
    assert r1.calibration is not None
    assert [source.dataset for source in r1.calibration.sources] == ["openr1", "ultrachat", "code", "multilingual"]
    assert r1.model_copy(update={"model": v3.model, "calibration": v3.calibration}) == v3


def test_each_reach_of_v3_is_what_it_says(plans: dict[str, Plan]) -> None:
    by_role: list[dict[str, set[str | None]]] = []
    for variant in plans["deepseek-v3"].variants:
        schemes: dict[str, set[str | None]] = {}
        for step in variant.steps:
            if step.tensor.rule is not None and step.tensor.rule.linear:
                schemes.setdefault(step.tensor.role, set()).add(step.quantize.quantize if step.quantize else None)
        by_role.append(schemes)
    kept = {role: {None} for role in ("kv_b", "lm_head", "mtp", "router") if role in by_role[0]}
    rest = ("attention", "shared_experts", "dense_mlp")
    assert "kv_b" in kept
    assert by_role[0] == {"routed_experts": {"int4_g128"}} | {role: {None} for role in rest} | kept
    in_part = {"attention": {"int8_weight", None}}  # q_a_proj and kv_a_proj_with_mqa stay 16 bits
    assert by_role[1] == {"routed_experts": {"int4_g128"}} | {role: {"int8_weight"} for role in rest} | in_part | kept
    in_part = {"attention": {"int4_g128", None}}
    assert by_role[2] == {role: {"int4_g128"} for role in ("routed_experts", *rest)} | in_part | kept


def test_gpu_engines_take_every_variant_of_v3_by_their_rules(plans: dict[str, Plan]) -> None:
    for variant in plans["deepseek-v3"].variants:
        verdicts = {verdict.engine.name: verdict for verdict in variant.engines}
        assert not any(verdicts[name].prevented for name in ("transformers", "vllm", "sglang")), variant.name


def test_int4_experts_of_v3(plans: dict[str, Plan]) -> None:
    experts, mixed, whole = plans["deepseek-v3"].variants
    routed, everything = 58 * 256 * 3 * 7168 * 2048, 684.490e9  # with the multi-token-prediction layer
    assert experts.artifact_bytes == pytest.approx(routed * 4.125 / 8 + (everything - routed) * 2, rel=1e-3)
    assert whole.artifact_bytes < mixed.artifact_bytes < experts.artifact_bytes


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2-lite"])
def test_the_safe_recipe_is_there_and_no_rule_prevents_it(plans: dict[str, Plan], name: str) -> None:
    """Routed experts int4, all else 16 bits: no engine that reads packed integers refuses or misreads it."""
    (variant,) = (variant for variant in plans[name].variants if variant.name == "w4a16-experts")
    quantized = {step.tensor.role: step.scheme for step in variant.steps if step.scheme is not None}
    assert set(quantized) == {"routed_experts"}
    prevented = {verdict.engine.name for verdict in variant.engines if verdict.prevented}
    assert prevented == {"tensorrt-llm", "gptqmodel", "llama.cpp"}
