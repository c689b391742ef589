"""Declarations of families against transformers' modules and configs."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from quantlab.architectures.detect import ARCHITECTURES, detect, of_model_type
from quantlab.architectures.layer import GATED_MLP, GroupedAttention, LatentAttention, Routing
from quantlab.errors import CheckpointError
from quantlab.runtime.load import load
from tests.checkpoints import CONFIGS
from tests.runtime.tiny import relative_error, tokens, write_checkpoint
from tests.true_shapes import DISTILL_7B, QWEN3_8B, V2_LITE, V3


@pytest.fixture(scope="module")
def skeletons() -> dict[str, torch.nn.Module]:
    """transformers' models of every family on the meta device."""
    with torch.device("meta"):
        return {
            family: AutoModelForCausalLM.from_config(CONFIG_MAPPING[family].from_dict(dict(config)))
            for family, config in CONFIGS.items()
        }


def test_there_is_a_config_of_every_family() -> None:
    assert {architecture.name for architecture in ARCHITECTURES} == set(CONFIGS)
    for family, config in CONFIGS.items():
        assert detect(config) is of_model_type(family)
        assert detect({"model_type": family}) is of_model_type(family)
    assert of_model_type("gpt2") is None


@pytest.mark.parametrize("family", CONFIGS)
def test_declared_modules_are_those_of_transformers(family: str, skeletons: dict[str, torch.nn.Module]) -> None:
    architecture, config = detect(CONFIGS[family]), CONFIGS[family]
    layer, declared = skeletons[family].model.layers[-1], architecture.attention
    halves = {name for half in architecture.halves for name in (half.norm, half.module)}
    assert {name for name, _ in layer.named_children()} == halves
    attention = set(dict(layer.self_attn.named_children()))
    if isinstance(declared, GroupedAttention):
        norms = set() if declared.head_norms is None else {declared.head_norms.query, declared.head_norms.key}
        assert attention == {declared.QUERY, declared.KEY, declared.VALUE, declared.OUTPUT} | norms
    else:
        common = {declared.LATENT_DOWN, declared.LATENT_NORM, declared.LATENT_UP, declared.OUTPUT}
        compressed = {declared.QUERY_DOWN, declared.QUERY_NORM, declared.QUERY_UP}
        assert attention == common | (compressed if declared.query_rank(config) else {declared.QUERY})
    names = {GATED_MLP.gate, GATED_MLP.up, GATED_MLP.down, GATED_MLP.activation}
    if architecture.mixture is None:
        assert set(dict(layer.mlp.named_children())) == names
        return
    mixture = architecture.mixture
    assert set(dict(layer.mlp.named_children())) == {mixture.EXPERTS, mixture.ROUTER, mixture.SHARED}
    assert set(dict(layer.mlp.shared_experts.named_children())) == names
    buffers = dict(layer.mlp.gate.named_buffers())
    assert set(buffers) == ({mixture.BIAS} if mixture.routing(config).corrected else set())


@pytest.mark.parametrize("family", CONFIGS)
def test_linears_of_one_input_are_those_transformers_calls_with_it(
    family: str, skeletons: dict[str, torch.nn.Module]
) -> None:
    """Compare with the linears that an attention module calls with its own input tensor."""
    called: list[str] = []
    module = skeletons[family].model.layers[0].self_attn
    x = torch.empty(1, 3, int(CONFIGS[family]["hidden_size"]), device="meta", dtype=next(module.parameters()).dtype)
    for name, child in module.named_children():
        child.register_forward_pre_hook(lambda _, args, name=name: called.append(name) if args[0] is x else None)
    positions = skeletons[family].model.rotary_emb(x, position_ids=torch.arange(3, device="meta")[None])
    module(hidden_states=x, position_embeddings=positions, attention_mask=None)
    assert set(called) == set(detect(CONFIGS[family]).same_input("attention", CONFIGS[family]))


def test_routing_of_the_released_models() -> None:
    v3, v2 = detect(V3).mixture, detect(V2_LITE).mixture
    assert v3 is not None
    assert v2 is not None
    released = {"n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "routed_scaling_factor": 2.5}
    assert v3.routing(V3 | released | {"norm_topk_prob": True}) == Routing(
        256, 8, groups=8, top_groups=4, group_score=2, scoring="sigmoid", corrected=True, normalised=True, scaling=2.5
    )
    # arXiv 2405.04434, section 2.2.2: of 160 experts in 8 groups 6 are chosen in 3 groups
    limited = {"n_routed_experts": 160, "n_group": 8, "topk_group": 3, "num_experts_per_tok": 6}
    scaled = limited | {"routed_scaling_factor": 16.0, "topk_method": "group_limited_greedy"}
    assert v2.routing(V2_LITE | scaled) == Routing(160, 6, groups=8, top_groups=3, group_score=1, scaling=16.0)
    assert v2.routing(V2_LITE | limited | {"topk_method": "greedy"}) == Routing(160, 6)
    with pytest.raises(CheckpointError, match="routed_scaling_factor"):
        v2.routing(V2_LITE | {"routed_scaling_factor": "16"})


def test_a_config_with_fewer_experts() -> None:
    architecture = detect(V3)
    fewer = architecture.with_experts(V3, 64)
    assert fewer == {**V3, "n_routed_experts": 64, "num_nextn_predict_layers": 0}
    assert list(fewer) == list(V3), "fields stay in their order"
    assert architecture.dimensions(fewer)["experts"] == 64
    assert not any(rule.startswith("model.layers.61.") for rule, _ in architecture.expected(fewer, with_mtp=True))
    assert "num_nextn_predict_layers" not in architecture.with_experts({"n_routed_experts": 8}, 4)


def test_tensors_outside_transformers_model() -> None:
    v3, qwen = detect(V3), detect(DISTILL_7B)
    assert v3.outside_the_model("model.layers.61.eh_proj.weight", V3)
    assert not v3.outside_the_model("model.layers.60.mlp.gate.weight", V3)
    assert not v3.outside_the_model("model.layers.62.eh_proj.weight", V3), "config.json has one such layer"
    assert not qwen.outside_the_model("lm_head.weight", DISTILL_7B)
    assert qwen.outside_the_model("lm_head.weight", DISTILL_7B | {"tie_word_embeddings": True})


def test_windows() -> None:
    qwen, windows = detect(QWEN3_8B).attention, {"use_sliding_window": True, "sliding_window": 4096}
    assert qwen.window(QWEN3_8B) is None
    assert qwen.window(QWEN3_8B | windows | {"use_sliding_window": False}) is None
    assert qwen.window(QWEN3_8B | windows | {"max_window_layers": 36}) is None
    assert qwen.window(QWEN3_8B | windows | {"max_window_layers": 35}) == 4096
    assert qwen.window(QWEN3_8B | windows | {"layer_types": ["full_attention"] * 36}) is None
    assert isinstance(detect(V3).attention, LatentAttention)
    assert detect(V3).attention.window(V3) is None


def test_nothing_is_folded_through_norms_of_heads() -> None:
    architecture = detect(QWEN3_8B)
    rules = {
        name: architecture.classify(f"model.layers.0.self_attn.{name}", hidden_layers=36).rule
        for name in ("q_norm.weight", "k_norm.weight", "v_proj.weight")
    }
    assert all(rules[name] is not None and rules[name].feeds is None for name in ("q_norm.weight", "k_norm.weight"))
    assert rules["v_proj.weight"] is not None
    assert rules["v_proj.weight"].feeds == "o"


def test_yarn_is_scaled_as_engines_scale_it(tmp_path: Path) -> None:
    """vLLM: cos and sin times (0.1 ln factor + 1) times attn_factor, in its `YaRNScalingRotaryEmbedding`; here that is 1."""
    directory = write_checkpoint(tmp_path / "released", "qwen3")
    fields = json.loads((directory / "config.json").read_text())
    fields.pop("rope_parameters")
    released = QWEN3_8B["rope_scaling"] | {"original_max_position_embeddings": 16}
    (directory / "config.json").write_text(json.dumps(fields | {"rope_theta": 10000.0, "rope_scaling": released}))
    ids = tokens()
    with torch.no_grad():
        found = load(directory, dtype=torch.float32)
        unread = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        said = {key: value for key, value in released.items() if key != "attn_factor"} | {"attention_factor": 1.0}
        (directory / "config.json").write_text(json.dumps(fields | {"rope_theta": 10000.0, "rope_scaling": said}))
        expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        assert found.model.rotary_emb.attention_scaling == pytest.approx(1.0)
        assert relative_error(found(ids).logits, expected(ids).logits) < 1e-5
        assert relative_error(unread(ids).logits, expected(ids).logits) > 1e-3, (
            "transformers alone does not read the field"
        )
