"""Models of `load`, compared with transformers' model of the dequantized weights."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

from quantlab.errors import ArtifactError, CheckpointError
from quantlab.numerics.fp8 import quantize_blocks
from quantlab.recipe.schemes import SCHEMES, SchemeName
from quantlab.runtime.banks.choice import QuantizedMatrices
from quantlab.runtime.load import load
from tests.runtime.tiny import (
    Artifact,
    dense_reference,
    edit_config,
    quantize,
    relative_error,
    rewrite,
    tokens,
    write_checkpoint,
)

FAMILIES = ("deepseek_v2", "deepseek_v3", "llama", "qwen2", "qwen3")
Maker = Callable[[str, SchemeName], Artifact]


def logits(model: PreTrainedModel, batch: int = 2) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(batch)).logits


def greedy(model: PreTrainedModel, **settings: object) -> Tensor:
    return model.generate(tokens(1, 7), max_new_tokens=12, do_sample=False, **settings)


def with_int8_activations(model: PreTrainedModel) -> PreTrainedModel:
    """transformers' model with the inputs of every quantized linear, experts included, rounded as in W8A8."""

    def rounded(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return torch.where(scale > 0, (x / scale).round() * scale, 0)

    def expert_loop(module: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            result = torch.zeros_like(hidden)
            for token, expert in ((t, e) for t in range(index.shape[0]) for e in range(index.shape[1])):
                number = index[token, expert]
                gate, up = (module.gate_up_proj[number] @ rounded(hidden[token])).chunk(2)
                result[token] += weights[token, expert] * (
                    module.down_proj[number] @ rounded(nn.functional.silu(gate) * up)
                )
            return result

        return forward

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(("lm_head", "kv_b_proj")):
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
        if name.endswith("mlp.experts"):
            module.forward = expert_loop(module)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_checkpoints_load_as_in_transformers(family: str, checkpoints: dict[str, Path]) -> None:
    model = load(checkpoints[family], dtype=torch.float32)
    reference = dense_reference(checkpoints[family])
    assert relative_error(logits(model), logits(reference)) <= 1e-5
    assert torch.equal(greedy(model), greedy(reference))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("scheme", ["int4_g128", "int4_g32", "int8_weight"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weight_only_artifacts_equal_their_dense_model(family: str, scheme: SchemeName, artifacts: Maker) -> None:
    artifact = artifacts(family, scheme)
    model = load(artifact.directory, dtype=torch.float32)
    reference = dense_reference(artifact.dense)
    assert relative_error(logits(model), logits(reference)) <= 1e-5
    assert torch.equal(greedy(model), greedy(reference))
    assert any(isinstance(module, QuantizedMatrices) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_w8a8_artifacts_equal_the_dense_model_with_rounded_activations(family: str, artifacts: Maker) -> None:
    artifact = artifacts(family, "int8")
    model = load(artifact.directory, dtype=torch.float32)
    unrounded = dense_reference(artifact.dense)
    reference = with_int8_activations(dense_reference(artifact.dense))
    # a last bit of float32 can move an activation to the next of 127 steps; without rounding the difference is far larger
    assert relative_error(logits(model), logits(reference)) <= 0.2 * relative_error(
        logits(unrounded), logits(reference)
    )


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("scheme", ["int4_g128", "int8_weight"])
def test_transformers_reads_the_same_model_from_the_artifact(family: str, scheme: SchemeName, artifacts: Maker) -> None:
    directory = artifacts(family, scheme).directory
    expanded = CompressedTensorsConfig(dequantize=True)
    foreign = (
        AutoModelForCausalLM.from_pretrained(directory, quantization_config=expanded, experts_implementation="eager")
        .eval()
        .float()
    )
    assert relative_error(logits(load(directory, dtype=torch.float32)), logits(foreign)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["int4_g128", "int8", "int8_weight"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_activations_stay_close(
    family: str, scheme: SchemeName, dtype: torch.dtype, artifacts: Maker
) -> None:
    directory = artifacts(family, scheme).directory
    exact, fast = (load(directory, dtype=chosen) for chosen in (torch.float32, dtype))
    assert fast.dtype == dtype
    found, expected = logits(fast).float(), logits(exact)
    # routing can flip a token's expert on a rounding, so the whole is compared, not each number
    assert (found - expected).norm() / expected.norm() <= (0.05 if family in {"llama", "qwen2", "qwen3"} else 0.25)
    assert greedy(fast).shape == (1, 19)


def test_decoding_with_a_cache_equals_the_whole_sequence(artifacts: Maker) -> None:
    model = load(artifacts("deepseek_v3", "int4_g128").directory, dtype=torch.float32)
    whole = logits(model)
    with torch.no_grad():
        first = model(input_ids=tokens()[:, :6], use_cache=True)
        parts = [first.logits]
        for position in range(6, 11):
            step = model(
                input_ids=tokens()[:, position : position + 1], past_key_values=first.past_key_values, use_cache=True
            )
            parts.append(step.logits)
    assert relative_error(torch.cat(parts, dim=1), whole) <= 1e-5
    assert torch.equal(greedy(model, use_cache=False), greedy(model))


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
def test_scales_of_other_dtypes(scale_dtype: torch.dtype, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    artifact = quantize(checkpoints["deepseek_v2"], tmp_path / "artifact", SCHEMES["int4_g64"], scale_dtype=scale_dtype)
    model = load(artifact.directory, dtype=torch.float32)
    assert relative_error(logits(model), logits(dense_reference(artifact.dense))) <= 1e-5


def fp8_checkpoint(source: Path, target: Path) -> tuple[Path, Path]:
    """The source in FP8 blocks of 128 (kv_a has 144 rows: partial blocks), and its dequantized bfloat16 weights."""
    shutil.copytree(source, target)
    dense = target.with_name(target.name + "-dense")
    shutil.copytree(source, dense)
    stored, meant = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        stored[name] = meant[name] = weight
        if name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
            stored[name], scale = quantize_blocks(weight, block=(128, 128))
            stored[name + "_scale_inv"] = scale
            rows, columns = weight.shape
            per_weight = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
            meant[name] = (stored[name].float() * per_weight).bfloat16()
    rewrite(target, stored)
    rewrite(dense, meant)
    block = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
    edit_config(target, lambda fields: fields.update(quantization_config=block))
    return target, dense


def test_fp8_checkpoints_with_partial_blocks(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source, dense = fp8_checkpoint(checkpoints["deepseek_v3"], tmp_path / "fp8")
    assert load_file(source / "model.safetensors")["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape == (
        144,
        128,
    )
    assert load(source).dtype == torch.bfloat16
    assert relative_error(logits(load(source, dtype=torch.float32)), logits(dense_reference(dense))) <= 1e-5


def test_untied_heads_and_biases_and_generation_config(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "untied", "qwen2", tie_word_embeddings=False)
    (source / "generation_config.json").write_text('{"eos_token_id": 7, "max_new_tokens": 3}')
    model = load(source, dtype=torch.float32)
    assert relative_error(logits(model), logits(dense_reference(source))) <= 1e-5
    assert model.generation_config.eos_token_id == 7
    tied = load(checkpoints["qwen2"])
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_tensors_that_transformers_keeps_in_float32_stay_float32(checkpoints: dict[str, Path]) -> None:
    model = load(checkpoints["deepseek_v3"], dtype=torch.float16)
    stored = load_file(checkpoints["deepseek_v3"] / "model.safetensors")[
        "model.layers.1.mlp.gate.e_score_correction_bias"
    ]
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, stored)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not model.model.rotary_emb.inv_freq.is_meta


def test_dtype_defaults_to_the_artifact(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoints["llama"], tmp_path / "copy")
    for word, dtype in (("float16", torch.float16), ("float32", torch.float32)):
        edit_config(copy, lambda fields, word=word: (fields.pop("dtype", None), fields.update(torch_dtype=word)))
        assert load(copy).dtype == dtype
    edit_config(copy, lambda fields: fields.update(torch_dtype="int4"))
    with pytest.raises(ArtifactError, match="dtype is unknown"):
        load(copy)


def test_mtp_layers_are_ignored_only_if_the_config_declares_them(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoints["deepseek_v3"], tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    rewrite(
        copy,
        weights
        | {"model.layers.2.eh_proj.weight": torch.zeros(4, 4), "model.layers.2.mlp.gate.weight": torch.zeros(8, 4)},
    )
    edit_config(copy, lambda fields: fields.update(num_nextn_predict_layers=0))
    with pytest.raises(ArtifactError, match=r"does not use[^$]*layers\.2\.eh_proj"):
        load(copy)
    edit_config(copy, lambda fields: fields.update(num_nextn_predict_layers=1))
    assert torch.equal(logits(load(copy)), logits(load(checkpoints["deepseek_v3"])))


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.1.mlp.experts.5.up_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.0.self_attn.o_proj.weight",
    ],
)
def test_a_missing_tensor_is_an_error(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoints["deepseek_v3"], tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights[name]
    rewrite(copy, weights)
    with pytest.raises(ArtifactError, match=f"missing[^$]*{name}"):
        load(copy)


def test_a_missing_part_of_a_packed_weight_is_an_error(artifacts: Maker, tmp_path: Path) -> None:
    for part in ("weight_scale", "weight_packed"):
        copy = shutil.copytree(artifacts("llama", "int4_g128").directory, tmp_path / part)
        weights = load_file(copy / "model.safetensors")
        del weights[f"model.layers.1.mlp.down_proj.{part}"]
        rewrite(copy, weights)
        with pytest.raises((ArtifactError, CheckpointError), match=r"model\.layers\.1\.mlp\.down_proj"):
            load(copy)


def test_an_unused_tensor_or_a_wrong_shape_is_an_error(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoints["deepseek_v2"], tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    rewrite(copy, weights | {"model.layers.1.mlp.experts.8.up_proj.weight": torch.zeros(2, 2)})
    with pytest.raises(ArtifactError, match=r"does not use[^$]*experts\.8\.up_proj"):
        load(copy)
    rewrite(copy, weights | {"model.norm.weight": torch.zeros(64)})
    with pytest.raises(ArtifactError, match=r"does not match the config[^$]*model\.norm\.weight"):
        load(copy)


def test_experts_of_one_layer_in_different_schemes_are_an_error(artifacts: Maker, tmp_path: Path) -> None:
    copy = shutil.copytree(artifacts("deepseek_v2", "int4_g128").directory, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    prefix = "model.layers.1.mlp.experts.3.up_proj.weight"
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}
    rewrite(copy, weights | {prefix: torch.zeros(128, 128).bfloat16()})
    with pytest.raises(ArtifactError, match="different number formats"):
        load(copy)


def test_gate_and_up_of_a_dense_mlp_may_differ(artifacts: Maker, tmp_path: Path) -> None:
    artifact = artifacts("llama", "int4_g128")
    copy = shutil.copytree(artifact.directory, tmp_path / "copy")
    prefix = "model.layers.1.mlp.up_proj.weight"
    weights = {
        name: tensor for name, tensor in load_file(copy / "model.safetensors").items() if not name.startswith(prefix)
    }
    rewrite(copy, weights | {prefix: load_file(artifact.dense / "model.safetensors")[prefix]})
    assert relative_error(logits(load(copy, dtype=torch.float32)), logits(dense_reference(artifact.dense))) <= 1e-5


def test_an_unknown_model_is_an_error(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoints["llama"], tmp_path / "copy")
    edit_config(copy, lambda fields: fields.update(model_type="mamba"))
    with pytest.raises(ArtifactError, match=r"model_type[^$]*'mamba'[^$]*deepseek_v3"):
        load(copy)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"hidden_size": "wide"}),
        ("llama", {"num_attention_heads": 0}),
        ("llama", {"num_hidden_layers": None}),
        ("llama", {"rope_scaling": 3}),
        ("llama", {"rope_parameters": {"rope_type": "yarnn"}}),
        ("deepseek_v3", {"n_routed_experts": None}),
        ("deepseek_v3", {"hidden_act": "relux"}),
    ],
)
def test_an_invalid_config(
    family: str, change: dict[str, object], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(checkpoints[family], tmp_path / "copy")
    edit_config(copy, lambda fields: fields.update(change))
    with pytest.raises(ArtifactError, match=r"cannot build a model[^$]*config[^$]*released with"):
        load(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 64},
        {"vocab_size": 97},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 1, "num_nextn_predict_layers": 0},
    ],
)
def test_a_config_of_another_model(change: dict[str, int], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for family in ("llama", "deepseek_v3"):
        copy = shutil.copytree(checkpoints[family], tmp_path / family)
        edit_config(copy, lambda fields: fields.update(change))
        with pytest.raises(ArtifactError, match=r"does not match the config|missing|does not use"):
            load(copy)


def test_every_tensor_is_read_once_and_reported(artifacts: Maker) -> None:
    seen: list[tuple[int, int]] = []
    load(artifacts("deepseek_v3", "int4_g128").directory, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, seen[0][1] + 1))
