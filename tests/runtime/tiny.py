"""Tiny checkpoints of all families, and artifacts made from them independently of quantlab.run."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from quantlab.algorithms.rtn import rtn
from quantlab.formats.codecs.table import encode
from quantlab.recipe.schemes import Scheme
from tests.checkpoints import all_linears

COMMON: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LATENT: Mapping[str, Any] = {
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2": {**COMMON, **LATENT, "q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "deepseek_v3": {
        **COMMON,
        **LATENT,
        "q_lora_rank": 128,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
    },
    "llama": {**COMMON, "num_key_value_heads": 2},
    "qwen2": {**COMMON, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {**COMMON, "num_key_value_heads": 2, "head_dim": 64},
}
IGNORE = ("lm_head", r"re:.*mlp\.gate$", r"re:.*kv_b_proj$")
LINEAR = ("_proj.weight", "_proj_with_mqa.weight")


@dataclass(frozen=True)
class Artifact:
    """A quantized artifact, and the plain float32 checkpoint of its dequantized weights."""

    directory: Path
    dense: Path


def write_checkpoint(directory: Path, family: str, **changes: object) -> Path:
    """A bfloat16 checkpoint with random weights, random router biases included."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("bias", "norm.weight")):
            tensor.data.add_(torch.randn_like(tensor) * 0.1)
    model.save_pretrained(directory)
    weights = load_file(directory / "model.safetensors")
    rewrite(
        directory,
        {name: tensor if name.endswith("correction_bias") else tensor.bfloat16() for name, tensor in weights.items()},
    )
    edit_config(directory, lambda fields: fields.update(dtype="bfloat16"))
    return directory


def rewrite(directory: Path, weights: Mapping[str, Tensor]) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )


def edit_config(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    fields = json.loads((directory / "config.json").read_text())
    edit(fields)
    (directory / "config.json").write_text(json.dumps(fields))


def quantize(source: Path, target: Path, scheme: Scheme, *, scale_dtype: torch.dtype = torch.bfloat16) -> Artifact:
    """Quantize every linear except the ignored ones by rounding to nearest."""
    quantization = all_linears(scheme, IGNORE)
    shutil.copytree(source, target)
    dense = target.with_name(target.name + "-dense")
    shutil.copytree(source, dense)
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not name.endswith(LINEAR) or quantization.format_of(name.removesuffix(".weight")) is None:
            stored[name], meant[name] = weight, weight.float()
            continue
        matrix = rtn(
            weight,
            bits=scheme.format.bits,
            group_size=scheme.format.group_size,
            scale_dtype=scale_dtype,
            grid=scheme.grid,
        )
        stored.update(encode(scheme.layout, name, matrix))
        width = weight.shape[1] // matrix.scale.shape[1]
        per_weight = matrix.scale.repeat_interleave(width, dim=1)
        steps = matrix.q if matrix.zero is None else matrix.q - matrix.zero.repeat_interleave(width, dim=1)
        # W8A8 multiplies the integers exactly; expanded weights are formed in the dtype of the scale
        meant[name] = (steps.to(torch.float32 if scheme.format.activations else scale_dtype) * per_weight).float()
    rewrite(target, stored)
    rewrite(dense, meant)
    edit_config(target, lambda fields: fields.update(quantization_config=quantization.to_json()))
    edit_config(dense, lambda fields: fields.update(dtype="float32"))
    return Artifact(target, dense)


def dense_reference(directory: Path) -> PreTrainedModel:
    """transformers' model in float32, with its reference loop over experts."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="eager", attn_implementation="sdpa"
    ).eval()


def tokens(batch: int = 2, length: int = 11) -> Tensor:
    return torch.randint(2, 96, (batch, length), generator=torch.Generator().manual_seed(1))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
