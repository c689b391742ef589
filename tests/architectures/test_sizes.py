"""The families' rules against the published parameter counts of the real models."""

import math

import pytest

from quantlab.architectures.families import detect

V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168, "num_attention_heads": 128,
    "num_hidden_layers": 61, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512,
    "q_lora_rank": 1536, "n_routed_experts": 256, "moe_intermediate_size": 2048, "n_shared_experts": 1,
    "intermediate_size": 18432, "first_k_dense_replace": 3, "num_nextn_predict_layers": 1, "vocab_size": 129280,
    "topk_method": "noaux_tc", "moe_layer_freq": 1,
}  # fmt: skip
V2 = V3 | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 5120, "num_hidden_layers": 60,
    "n_routed_experts": 160, "moe_intermediate_size": 1536, "n_shared_experts": 2, "intermediate_size": 12288,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "vocab_size": 102400, "topk_method": "group_limited_greedy",
}  # fmt: skip
V2_LITE = V2 | {
    "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "q_lora_rank": None, "n_routed_experts": 64,
    "moe_intermediate_size": 1408, "intermediate_size": 10944,
}  # fmt: skip
LLM_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 30,
    "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 102400,
}  # fmt: skip
DISTILL_7B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "with_mtp", "tensors", "billions"),
    [
        (V3, False, None, 671.026),
        (V3, True, None, 684.490),
        (V2, False, 29_102, 235.741),
        (V2_LITE, False, 5_291, 15.706),
        (LLM_7B, False, None, 6.910),
        (DISTILL_7B, False, None, 7.616),
    ],
    ids=["V3", "V3 with MTP", "V2", "V2-Lite", "LLM-7B", "R1-Distill-Qwen-7B"],
)
def test_published_sizes(config: dict, with_mtp: bool, tensors: int | None, billions: float) -> None:
    expected = list(detect(config).expected(config, with_mtp=with_mtp))
    assert sum(math.prod(shape) for _, shape in expected) / 1e9 == pytest.approx(billions, abs=0.0006)
    assert tensors is None or len(expected) == tensors
    assert len({name for name, _ in expected}) == len(expected)


def test_first_rule_claims_the_right_role() -> None:
    architecture = detect(V3)
    roles = {
        "model.layers.3.mlp.experts.255.up_proj.weight": "routed_experts",
        "model.layers.3.mlp.shared_experts.up_proj.weight": "shared_experts",
        "model.layers.2.mlp.up_proj.weight": "dense_mlp",
        "model.layers.3.mlp.gate.weight": "router",
        "model.layers.3.self_attn.kv_b_proj.weight": "kv_b",
        "model.layers.61.self_attn.kv_b_proj.weight": "mtp",
        "model.layers.61.eh_proj.weight": "mtp",
        "model.layers.3.something.new": "other",
    }
    for name, role in roles.items():
        assert architecture.claim(name, hidden_layers=61).role == role
