"""Configs that cannot be right, or that no module computes, are refused by `plan`; the released ones pass."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

from quantlab.architectures.detect import detect, of_model_type
from quantlab.architectures.fields import LEFT_OUT, REQUIRED
from quantlab.architectures.known_fields import ACTIVATIONS
from quantlab.checkpoint.index import open_checkpoint
from quantlab.errors import ArtifactError, CheckpointError, PlanError
from quantlab.plan.compile import compile_plan
from quantlab.recipe.load import load_recipe
from quantlab.recipe.schema import Recipe
from quantlab.run.artifact import patched_config
from quantlab.runtime.load import load
from tests.checkpoints import CONFIGS
from tests.true_shapes import CODER_7B, DISTILL_7B, DISTILL_8B, LLM_7B, QWEN3_8B, V2, V2_LITE, V3

WriteRecipe = Callable[..., Path]
CAST = Recipe.model_validate({"model": "m", "variants": {"fp16": [{"cast": "float16"}]}})
REMOVED = object()


def with_config(source: Path, target: Path, **changes: object) -> Path:
    """A copy of a checkpoint with another config.json."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not REMOVED}
    (target / "config.json").write_text(json.dumps(kept))
    return target


NOT_COMPUTED = [
    ("deepseek_v2", "norm_topk_prob", True, "supported: false"),
    ("deepseek_v2", "scoring_func", "sigmoid", 'supported: "softmax"'),
    ("deepseek_v2", "topk_method", "noaux_tc", 'supported: "greedy", "group_limited_greedy"'),
    ("deepseek_v2", "moe_layer_freq", 2, "supported: 1"),
    ("deepseek_v2", "rope_interleave", False, "supported: true"),
    ("deepseek_v3", "scoring_func", "softmax", 'supported: "sigmoid"'),
    ("deepseek_v3", "topk_method", "greedy", 'supported: "noaux_tc"'),
    ("deepseek_v3", "topk_method", "group_limited_greedy", 'supported: "noaux_tc"'),
    ("deepseek_v3", "moe_layer_freq", 2, "supported: 1"),
    ("llama", "hidden_act", "relux", '"silu"'),
    ("qwen3", "hidden_act", "prelu", '"silu"'),
]


@pytest.mark.parametrize(("family", "field", "value", "supported"), NOT_COMPUTED)
def test_a_value_that_no_module_computes_is_refused(
    family: str, field: str, value: object, supported: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    directory = with_config(checkpoints[family], tmp_path / "c", **{field: value})
    with pytest.raises(CheckpointError) as caught:
        compile_plan(CAST, open_checkpoint(directory))
    assert field in caught.value.what
    assert caught.value.found == json.dumps(value)
    assert supported in (caught.value.fix or "")
    with pytest.raises(ArtifactError, match=field):
        load(directory)


CONTRADICTIONS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("deepseek_v3", {"n_group": 3}, ("n_group", "n_routed_experts")),
    ("deepseek_v2", {"n_group": 3}, ("n_group", "n_routed_experts")),
    ("deepseek_v3", {"topk_group": 5}, ("topk_group", "n_group")),
    ("deepseek_v2", {"topk_group": 2}, ("topk_group", "n_group")),
    ("deepseek_v3", {"num_experts_per_tok": 9}, ("num_experts_per_tok", "n_routed_experts")),
    ("deepseek_v3", {"num_experts_per_tok": 5}, ("num_experts_per_tok", "topk_group")),
    ("deepseek_v3", {"n_group": 8}, ("n_group", "n_routed_experts")),
    ("deepseek_v2", {"n_group": 4, "topk_method": "group_limited_greedy", "num_experts_per_tok": 3}, ("num_experts_per_tok", "topk_group")),
    ("deepseek_v3", {"num_local_experts": 16}, ("n_routed_experts", "num_local_experts")),
    ("deepseek_v2", {"num_experts": 4}, ("n_routed_experts", "num_experts")),
    ("llama", {"num_key_value_heads": 3}, ("num_key_value_heads", "num_attention_heads")),
    ("deepseek_v3", {"num_key_value_heads": 3}, ("num_key_value_heads", "num_attention_heads")),
    ("llama", {"num_attention_heads": 6}, ("num_attention_heads", "hidden_size")),
    ("deepseek_v2", {"num_attention_heads": 3, "num_key_value_heads": 3}, ("num_attention_heads", "hidden_size")),
    ("qwen3", {"head_dim": 63}, ("head_dim",)),
    ("deepseek_v2", {"qk_rope_head_dim": 15}, ("qk_rope_head_dim",)),
    ("qwen2", {"layer_types": ["full_attention"]}, ("layer_types", "num_hidden_layers")),
    ("qwen2", {"layer_types": ["sliding_attention"] * 3}, ("layer_types", "use_sliding_window")),
    ("llama", {"eos_token_id": [1, 384]}, ("eos_token_id", "vocab_size")),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 0}}, ("rope_scaling.rope_type", "rope_scaling.factor")),
    ("llama", {"rope_scaling": {"type": "yarnn", "factor": 4}}, ("rope_scaling.rope_type",)),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "named"), CONTRADICTIONS, ids=range(len(CONTRADICTIONS)))
def test_fields_that_contradict_each_other_are_named(
    family: str, changes: dict[str, Any], named: tuple[str, ...], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    directory = with_config(checkpoints[family], tmp_path / "c", **changes)
    with pytest.raises(CheckpointError) as caught:
        compile_plan(CAST, open_checkpoint(directory))
    for name in named:
        assert name in (caught.value.where or "")
        assert f"{name} = " in (caught.value.found or "")
    assert caught.value.fix


UNUSABLE = [
    *[(family, "rms_norm_eps", value) for family in CONFIGS for value in ("1e-6", None, 0, -1e-6, float("nan"), True)],
    *[("llama", "attention_bias", value) for value in (None, 0, "false")],
    *[("deepseek_v2", name, None) for name in ("attention_bias", "norm_topk_prob", "n_routed_experts", "hidden_act")],
    *[("deepseek_v3", name, None) for name in ("rope_interleave", "tie_word_embeddings", "routed_scaling_factor")],
    *[("deepseek_v3", name, 0) for name in ("kv_lora_rank", "n_group", "num_experts_per_tok", "q_lora_rank", "v_head_dim")],
    *[("qwen2", "num_hidden_layers", value) for value in (0, -1, 2.0, "3", 10**9, True, None, REMOVED)],
]  # fmt: skip


@pytest.mark.parametrize(("family", "field", "value"), UNUSABLE)
def test_values_without_a_meaning_are_refused(
    family: str, field: str, value: object, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    directory = with_config(checkpoints[family], tmp_path / "c", **{field: value})
    with pytest.raises(CheckpointError, match=f"no usable {field}"):
        compile_plan(CAST, open_checkpoint(directory))


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("deepseek_v2", "n_group"),
        ("deepseek_v2", "topk_group"),
        ("deepseek_v3", "num_mtp_layers"),
        ("llama", "head_dim"),
    ],
)
def test_null_is_the_default_where_it_means_that(
    family: str, field: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    directory = with_config(checkpoints[family], tmp_path / "c", **{field: None})
    compile_plan(CAST, open_checkpoint(directory))
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        found, expected = (
            load(one, dtype=torch.float32)(input_ids=ids).logits for one in (directory, checkpoints[family])
        )
    assert torch.equal(found, expected)


RELEASED = {
    "routed_scaling_factor": 16.0,
    "n_group": 8,
    "topk_group": 3,
    "num_experts_per_tok": 6,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
}
LITE = RELEASED | {"routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "topk_method": "greedy"}
V3_ROUTING = {
    "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "scoring_func": "sigmoid", "num_key_value_heads": 128, "ep_size": 1, "aux_loss_alpha": 0.001, "seq_aux": True,
    "hidden_act": "silu", "rms_norm_eps": 1e-06, "bos_token_id": 0, "eos_token_id": 1, "pretraining_tp": 1,
    "rope_scaling": {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        V3,
        V3 | V3_ROUTING,
        V2,
        V2 | RELEASED,
        V2_LITE,
        V2_LITE | LITE,
        LLM_7B,
        CODER_7B,
        DISTILL_7B,
        DISTILL_8B,
        QWEN3_8B,
    ],
    ids=range(11),
)
def test_released_configs_are_read(config: dict[str, Any]) -> None:
    read = detect(config).read(config)
    assert read == config | {name: value for name, value in read.items() if name not in config}, "no value is changed"
    assert detect(config).read(read) is read


@pytest.mark.parametrize("family", CONFIGS)
def test_defaults_are_those_of_transformers(family: str) -> None:
    architecture, theirs = of_model_type(family), CONFIG_MAPPING[family]()
    assert architecture is not None
    own = {"deepseek_v2": {"num_experts_per_tok", "n_group", "topk_group"}, "deepseek_v3": {"num_nextn_predict_layers"}}
    not_theirs = {"scoring_func", "topk_method", "moe_layer_freq", "rope_interleave", "num_nextn_predict_layers"}
    for field in architecture.fields.fields:
        if field.default in (REQUIRED, LEFT_OUT) or callable(field.default) or field.name in own.get(family, ()):
            continue
        if field.name == "sliding_window":  # transformers removes it while use_sliding_window is false
            assert theirs.sliding_window is None
        elif field.name not in not_theirs or hasattr(theirs, field.name):
            assert getattr(theirs, field.name) == field.default, field.name


def test_activations_are_functions_of_one_tensor() -> None:
    assert set(ACT2FN) - set(ACTIVATIONS) == {"laplace", "prelu", "xielu"}
    for name in ACTIVATIONS:
        assert not list(ACT2FN[name].parameters())
        assert ACT2FN[name](torch.ones(2, 3)).shape == (2, 3)


BIASED = [
    (family, attention, mlp)
    for family in CONFIGS
    for attention in (False, True)
    for mlp in ((False, True) if family in {"llama", "deepseek_v2"} else (False,))
]


@pytest.mark.parametrize(("family", "attention", "mlp"), BIASED)
@pytest.mark.parametrize("q_lora_rank", [None, 64])
def test_expected_tensors_are_those_of_transformers(
    family: str, attention: bool, mlp: bool, q_lora_rank: int | None
) -> None:
    config = CONFIGS[family] | {"attention_bias": attention, "mlp_bias": mlp, "q_lora_rank": q_lora_rank}
    architecture = detect(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family].from_dict(dict(config)))
    tensors = (*model.named_parameters(), *model.named_buffers())
    theirs = {name: tuple(one.shape) for name, one in tensors if ".mlp.experts." not in name and "rotary" not in name}
    ours = dict(architecture.expected(config, with_mtp=False))
    assert {name: shape for name, shape in ours.items() if ".mlp.experts." not in name} == theirs


def test_qwen2_has_no_bias_of_the_output_projection(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = with_config(checkpoints["qwen2"], tmp_path / "c", attention_bias=True)
    (variant,) = compile_plan(CAST, open_checkpoint(directory)).variants
    assert not any(step.tensor.name.endswith("o_proj.bias") for step in variant.steps)
    assert load(directory, dtype=torch.float32)(input_ids=torch.tensor([[1, 2]])).logits.isfinite().all()


@pytest.mark.parametrize(
    "aliases", [{"num_local_experts": 8}, {"num_experts": 8}, {"num_experts": 8, "num_local_experts": 8}]
)
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("named", [True, False])
def test_fewer_experts_under_every_name(
    family: str,
    aliases: dict[str, int],
    named: bool,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    write_recipe: WriteRecipe,
) -> None:
    """V3 in one group, so that a share of its experts can be removed."""
    own = {} if named else {"n_routed_experts": REMOVED}
    one_group = {"n_group": 1, "topk_group": 1, "num_mtp_layers": 1 if family == "deepseek_v3" else 0}
    directory = with_config(checkpoints[family], tmp_path / "c", **aliases, **own, **one_group)
    recipe = write_recipe(
        directory, "  half: [{prune: 0.5, algorithm: {name: reap}}]\ncalibration: {corpus: c.jsonl, length: 64}\n"
    )
    plan = compile_plan(load_recipe(recipe).recipe, open_checkpoint(directory))
    written = patched_config(plan, plan.variants[0])
    assert {written[name] for name in ("n_routed_experts", *aliases)} == {4}
    assert written["num_mtp_layers"] == 0
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert plan.architecture.mixture is not None
    assert plan.architecture.mixture.routing(written).experts == 4
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert getattr(theirs, "num_experts" if family == "deepseek_v2" else "num_local_experts") == 4


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_no_share_can_be_removed_of_two_experts_in_a_group(
    share: float, checkpoints: dict[str, Path], write_recipe: WriteRecipe
) -> None:
    variants = f"  v: [{{prune: {share}, algorithm: {{name: reap}}}}]\ncalibration: {{corpus: c.jsonl, length: 64}}\n"
    recipe = load_recipe(write_recipe(checkpoints["deepseek_v3"], variants)).recipe
    with pytest.raises(PlanError, match="no share of the experts can be removed") as caught:
        compile_plan(recipe, open_checkpoint(checkpoints["deepseek_v3"]))
    found = caught.value.found or ""
    assert "2 experts in each of 4 routing groups" in found
    assert found.endswith("and the score of a group is computed from its 2 best")
    assert "prune at" not in (caught.value.fix or "")


@pytest.mark.parametrize(("share", "fix"), [(0.01, "at least 0.125"), (0.9, "at most 0.75")])
def test_a_share_that_works_is_named(
    share: float, fix: str, checkpoints: dict[str, Path], write_recipe: WriteRecipe
) -> None:
    def planned(share: float) -> int | None:
        variants = (
            f"  v: [{{prune: {share}, algorithm: {{name: reap}}}}]\ncalibration: {{corpus: c.jsonl, length: 64}}\n"
        )
        recipe = load_recipe(write_recipe(checkpoints["deepseek_v2"], variants)).recipe
        return compile_plan(recipe, open_checkpoint(checkpoints["deepseek_v2"])).variants[0].experts

    with pytest.raises(PlanError) as caught:
        planned(share)
    assert caught.value.fix == f"prune {fix}"
    assert planned(float(fix.split()[-1])) == (7 if "least" in fix else 2)
