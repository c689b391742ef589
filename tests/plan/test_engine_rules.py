"""Every rule of an engine: a small plan to which it applies, and a neighbour to which it does not.

The checkpoints are headers with the true widths of the released models and few layers.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from quantlab.checkpoint.index import open_checkpoint
from quantlab.console import plan_json
from quantlab.formats.contents import Contents
from quantlab.formats.engine_rules.table import ENGINES, RULES, verdicts
from quantlab.numerics.number_format import INT8, ROW, NumberFormat
from quantlab.plan.compile import compile_plan
from quantlab.plan.contents import contents_of_variant
from quantlab.plan.model import Plan, VariantPlan
from quantlab.recipe.load import load_recipe
from tests.true_shapes import DISTILL_7B, QWEN3_8B, V2_LITE, V3, write_headers

CONFIGS: dict[str, Mapping[str, Any]] = {
    "v3": V3 | {"num_hidden_layers": 2, "first_k_dense_replace": 1},
    "lite": V2_LITE | {"num_hidden_layers": 3, "n_routed_experts": 8},
    "distill": DISTILL_7B | {"num_hidden_layers": 2},
    "narrow": DISTILL_7B | {"num_hidden_layers": 1, "intermediate_size": 192},
    "uneven": DISTILL_7B | {"num_hidden_layers": 1, "intermediate_size": 18952},
    "half-tile": DISTILL_7B | {"num_hidden_layers": 1, "intermediate_size": 18976},
    "one-key": QWEN3_8B | {"num_hidden_layers": 1, "head_dim": 64, "num_key_value_heads": 1},
}
EXPERTS4 = "{quantize: int4_g64, targets: [routed_experts]}"
EXPERTS4_ASYM = "{quantize: int4_g128_asym, targets: [routed_experts]}"
INT8_ATTENTION = "{quantize: int8, targets: [attention]}"
BY_LAYER = (
    "{quantize: int4_g64, targets: [routed_experts], ignore: ['*.layers.1.*']}, "
    "{quantize: int4_g128, targets: [routed_experts], ignore: ['*.layers.2.*']}"
)
CASES: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "transformers-zero-point-experts": (("lite", EXPERTS4_ASYM), ("lite", EXPERTS4)),
    "transformers-int8-experts": (("lite", "{quantize: int8}"), ("lite", "{quantize: int8_weight}")),
    "transformers-unquantized-experts": (("lite", INT8_ATTENTION), ("lite", f"{INT8_ATTENTION}, {EXPERTS4}")),
    "transformers-expert-formats": (("lite", BY_LAYER), ("lite", EXPERTS4)),
    "transformers-zero-points": (("distill", "{quantize: int4_g128_asym}"), ("distill", "{quantize: int4_g128}")),
    "transformers-zero-points-mixed": (
        ("distill", "{quantize: int4_g128_asym, targets: [attention]}, {quantize: int8, targets: [dense_mlp]}"),
        ("distill", "{quantize: int4_g128_asym}"),
    ),
    "transformers-ragged-fp8": (("v3", "{quantize: fp8_block}"), ("distill", "{quantize: fp8_block}")),
    "transformers-smaller-fp8": (("narrow", "{quantize: fp8_block}"), ("distill", "{quantize: fp8_block}")),
    "transformers-expands": (("distill", "{quantize: int8_weight}"), ("distill", "{quantize: fp8_block}")),
    "vllm-ragged-fp8-gate": (
        ("lite", "{quantize: fp8_block}"),
        ("lite", "{quantize: fp8_block, targets: [routed_experts]}"),
    ),
    "vllm-ragged-fp8-keys": (("one-key", "{quantize: fp8_block}"), ("distill", "{quantize: fp8_block}")),
    "vllm-fused-a": (("v3", INT8_ATTENTION), ("v3", EXPERTS4)),
    "vllm-marlin-padding": (("half-tile", "{quantize: int4_g32}"), ("distill", "{quantize: int4_g32}")),
    "vllm-machete": (("distill", "{quantize: int4_g32}"), ("distill", "{quantize: int4_g128}")),
    "vllm-cpu-int8-weight": (("distill", "{quantize: int8_weight}"), ("distill", "{quantize: int8}")),
    "vllm-cpu-int8-weight-experts": (
        ("lite", "{quantize: int8_weight}"),
        ("lite", "{quantize: int8_weight, targets: [attention]}"),
    ),
    "vllm-cpu-zero-points": (("lite", EXPERTS4_ASYM), ("lite", EXPERTS4)),
    "vllm-cpu-experts": (("lite", EXPERTS4), ("lite", "{cast: float16}")),
    "vllm-cpu-sizes": (("uneven", "{quantize: int8_weight}"), ("distill", "{quantize: int8_weight}")),
    "sglang-int8-experts": (("lite", "{quantize: int8}"), ("lite", INT8_ATTENTION)),
    "sglang-mixed-experts": (
        ("lite", f"{EXPERTS4}, {INT8_ATTENTION}"),
        ("lite", f"{EXPERTS4}, {{quantize: int8_weight, targets: [attention]}}"),
    ),
    "sglang-zero-point-experts": (
        ("lite", EXPERTS4_ASYM),
        ("lite", "{quantize: int4_g128_asym, targets: [attention]}"),
    ),
    "sglang-kv-b": (
        ("lite", "{quantize: int4_g64, targets: [kv_b]}"),
        ("lite", "{quantize: int8, targets: [kv_b]}"),
    ),
    "sglang-fused-a": (
        ("v3", "{quantize: int4_g128, targets: [attention]}"),
        ("lite", "{quantize: int4_g64, targets: [attention]}"),
    ),
    "sglang-fused-by-name": (
        ("distill", "{quantize: int4_g128, ignore: ['*.layers.0.self_attn.*']}"),
        ("distill", "{quantize: int4_g128, ignore: ['*.layers.0.*.down_proj']}"),
    ),
    "sglang-shared-expert": (("v3", EXPERTS4), ("lite", EXPERTS4)),
    "sglang-ragged-fp8-gate": (
        ("lite", "{quantize: fp8_block}"),
        ("lite", "{quantize: fp8_block, targets: [routed_experts]}"),
    ),
    "sglang-ragged-fp8-values": (("one-key", "{quantize: fp8_block}"), ("distill", "{quantize: fp8_block}")),
    "tensorrt-llm-packed": (("distill", "{quantize: int4_g128}"), ("distill", "{quantize: int8}")),
    "tensorrt-llm-int8": (("distill", "{quantize: int8}"), ("distill", "{quantize: int8_weight}")),
    "ktransformers-int4-experts": (("lite", EXPERTS4), ("lite", "{cast: float16}")),
    "ktransformers-zero-points": (("lite", EXPERTS4_ASYM), ("lite", EXPERTS4)),
    "ktransformers-int8-weight-experts": (("lite", "{quantize: int8_weight}"), ("lite", EXPERTS4)),
    "ktransformers-int8-experts": (("lite", "{quantize: int8}"), ("lite", EXPERTS4)),
}
BY_HAND = {
    "vllm-fused", "sglang-fused", "vllm-experts", "sglang-experts", "transformers-gptq", "vllm-gptq-zero-points",
    "transformers-fp8-block-experts",
}  # fmt: skip
"""Rules for what no recipe writes."""


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Plan, VariantPlan]]:
    """The plan of every variant of `CASES`, by config and passes."""
    root = tmp_path_factory.mktemp("headers")
    planned = {}
    for name, config in CONFIGS.items():
        checkpoint = write_headers(root / name, config, shards=1)
        variants = sorted({passes for pair in CASES.values() for where, passes in pair if where == name})
        lines = [f"  v{number}: [{passes}]\n" for number, passes in enumerate(variants)]
        recipe = root / f"{name}.yaml"
        recipe.write_text(f"model: {checkpoint}\nvariants:\n{''.join(lines)}")
        plan = compile_plan(load_recipe(recipe).recipe, open_checkpoint(checkpoint))
        planned |= {(name, passes): (plan, one) for passes, one in zip(variants, plan.variants, strict=True)}
    return planned


def model_of(planned: tuple[Plan, VariantPlan]) -> Contents:
    return contents_of_variant(*planned)


def test_every_rule_has_its_case() -> None:
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)
    assert {*CASES, *BY_HAND} == set(names)
    assert all(rule.name.startswith(rule.engine) for rule in RULES)
    assert {rule.engine for rule in RULES} < set(ENGINES)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_applies_to_its_plan_and_not_to_the_neighbour(
    name: str, planned: dict[tuple[str, str], tuple[Plan, VariantPlan]]
) -> None:
    applies, neighbour = (
        {one.rule.name: one.finding for verdict in planned[case][1].engines for one in verdict.objections}
        for case in CASES[name]
    )
    assert name in applies
    assert name not in neighbour
    assert applies[name].subject.startswith("model.layers.")
    assert applies[name].found


def test_rules_that_refuse_a_recipe_find_what_differs(
    planned: dict[tuple[str, str], tuple[Plan, VariantPlan]],
) -> None:
    model = model_of(planned["lite", EXPERTS4])
    blocking = {rule.name: rule for rule in RULES if rule.blocks}
    assert set(blocking) == {"vllm-fused", "sglang-fused", "vllm-experts", "sglang-experts"}
    assert not any(rule.finds(model) for rule in blocking.values())
    changed = replace(
        model,
        weights=tuple(
            replace(weight, number=None)
            if weight.tensor.name.endswith("layers.1.mlp.experts.3.up_proj.weight")
            else weight
            for weight in model.weights
        ),
    )
    for name, rule in blocking.items():
        finding = rule.finds(changed)
        assert finding is not None
        assert finding.subject == ("layer 1 expert 3 gate+up" if name.endswith("fused") else "layer 1")
        assert "no scheme" in finding.found


def test_gptq_layouts(planned: dict[tuple[str, str], tuple[Plan, VariantPlan]]) -> None:
    model = model_of(planned["distill", "{quantize: int4_g128}"])

    def written(*, symmetric: bool) -> set[str]:
        number = NumberFormat(INT8, ROW, symmetric=symmetric)
        weights = tuple(
            replace(weight, number=number, layout="gptq") if weight.number else weight for weight in model.weights
        )
        found = verdicts(replace(model, weights=weights, method="gptq"))
        assert {one.engine.name for one in found if not one.reads_method} == {"tensorrt-llm", "llama.cpp"}
        return {one.rule.name for verdict in found for one in verdict.objections}

    assert written(symmetric=True) == {"transformers-gptq"}
    assert "vllm-gptq-zero-points" in written(symmetric=False)


@pytest.mark.parametrize(("name", "experts"), [("v3", EXPERTS4), ("lite", EXPERTS4)])
def test_int4_experts_and_nothing_else_is_the_safe_recipe(
    name: str, experts: str, planned: dict[tuple[str, str], tuple[Plan, VariantPlan]]
) -> None:
    found = {verdict.engine.name: verdict for verdict in planned[name, experts][1].engines}
    usable = {engine for engine, verdict in found.items() if not verdict.prevented}
    assert usable == {"transformers", "vllm", "vllm-cpu", "sglang", "ktransformers"}
    assert ("--disable-shared-experts-fusion" in found["sglang"].text) == (name == "v3")


def test_dense_models_have_no_verdict_of_engines_for_experts(
    planned: dict[tuple[str, str], tuple[Plan, VariantPlan]],
) -> None:
    engines = [verdict.engine.name for verdict in planned["distill", "{quantize: int8}"][1].engines]
    assert engines == [name for name in ENGINES if name != "ktransformers"]


def test_the_json_of_a_plan_names_the_source_of_every_objection(
    planned: dict[tuple[str, str], tuple[Plan, VariantPlan]],
) -> None:
    plan, variant = planned["lite", "{quantize: int8}"]
    (written,) = (one for one in plan_json(plan)["variants"] if one["variant"] == variant.name)
    sglang = next(one for one in written["engines"] if one["engine"] == "sglang")
    assert (sglang["run"], sglang["reads_method"], sglang["prevented"]) == (False, True, True)
    (objection,) = sglang["objections"]
    assert objection["rule"] == "sglang-int8-experts"
    assert objection["kind"] == "refuses"
    assert objection["where"].endswith("mlp.experts.0.gate_proj.weight")
    assert objection["source"] == {
        "repository": "sgl-project/sglang",
        "file": "python/sglang/srt/layers/quantization/compressed_tensors/compressed_tensors.py",
        "version": "0.5.23",
    }
    llama = next(one for one in written["engines"] if one["engine"] == "llama.cpp")
    assert llama["verdict"] == "reads no compressed-tensors safetensors"
