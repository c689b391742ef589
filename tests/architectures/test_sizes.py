"""The families' rules against the published parameter counts of the real models."""

import math

import pytest

from quantlab.architectures.detect import detect
from tests.true_shapes import CODER_7B, DISTILL_7B, DISTILL_8B, LLM_7B, QWEN3_8B, V2, V2_LITE, V3


@pytest.mark.parametrize(
    ("config", "with_mtp", "tensors", "billions"),
    [
        (V3, False, None, 671.026),
        (V3, True, None, 684.490),
        (V2, False, 29_102, 235.741),
        (V2_LITE, False, 5_291, 15.706),
        (LLM_7B, False, None, 6.910),
        (CODER_7B, False, None, 6.740),
        (DISTILL_7B, False, None, 7.616),
        (DISTILL_8B, False, None, 8.030),
        (QWEN3_8B, False, 399, 8.191),
    ],
    ids=[
        "V3",
        "V3 with MTP",
        "V2",
        "V2-Lite",
        "LLM-7B",
        "Coder-6.7B",
        "R1-Distill-Qwen-7B",
        "R1-Distill-Llama-8B",
        "R1-0528-Qwen3-8B",
    ],
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
        assert architecture.classify(name, hidden_layers=61).role == role
