"""Tiny random checkpoints of all families with the real tensor names, written by transformers.

The DeepSeek-V3 checkpoint is converted to the released layout: FP8 blocks with a ragged last block, a
multi-token-prediction layer, several shards, and a weight whose scale is in another shard.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlab.formats.compressed_tensors import Group, QuantizationConfig
from quantlab.recipe.schemes import SCHEMES, Scheme, SchemeName

INTEGERS: tuple[SchemeName, ...] = tuple(name for name, scheme in SCHEMES.items() if scheme.format.is_integer)
"""The schemes of integers."""

_COMMON = {
    "vocab_size": 384,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_MLA = {
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
CONFIGS: dict[str, dict[str, object]] = {
    "llama": {**_COMMON, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2},
    "qwen2": {**_COMMON, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2},
    "qwen3": {
        **_COMMON,
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "deepseek_v2": {
        **_COMMON,
        **_MLA,
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    "deepseek_v3": {
        **_COMMON,
        **_MLA,
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "q_lora_rank": 128,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
    },
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def all_linears(scheme: Scheme, ignore: tuple[str, ...] = ()) -> QuantizationConfig:
    """The description of a checkpoint whose linears have one scheme, except the ignored ones."""
    return QuantizationConfig((Group(("Linear",), scheme.format, scheme.layout),), ignore)


def make_checkpoint(
    directory: Path, family: str, *, seed: int = 0, sizes: Mapping[str, object] | None = None, fp8: bool = True
) -> Path:
    """Write a random checkpoint of a family and return its directory.

    Args:
        directory: created here.
        family: one of `CONFIGS`.
        seed: of the weights.
        sizes: fields of config.json that replace those of `CONFIGS`.
        fp8: store DeepSeek-V3 in FP8 blocks as released; otherwise bfloat16.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    directory.mkdir(parents=True)
    config = {**CONFIGS[family], **(sizes or {})}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.06)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.02)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1)
    model.save_pretrained(directory / "plain")
    tensors = load_file(directory / "plain" / "model.safetensors")
    for path in (directory / "plain").iterdir():
        path.unlink()
    (directory / "plain").rmdir()
    if family == "deepseek_v3":
        tensors = {name: t.float() if name.endswith("e_score_correction_bias") else t for name, t in tensors.items()}
        tensors = _with_mtp(tensors)
        if fp8:
            tensors = _to_fp8(tensors)
            (directory / "config.json").write_text(json.dumps({**config, "quantization_config": FP8}, indent=2))
        write_shards(directory, tensors, count=4)
    else:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "generation_config.json").write_text('{"bos_token_id": 0}\n')
    (directory / "tokenizer_config.json").write_text('{"note": "stands for a tokenizer"}\n')
    return directory


def write_shards(directory: Path, tensors: dict[str, Tensor], *, count: int) -> None:
    """Distribute the tensors round-robin over shards, so that weights and their scales are in different shards."""
    names = sorted(tensors)
    files = [f"model-{index + 1:05d}-of-{count:06d}.safetensors" for index in range(count)]
    weight_map = {name: files[index % count] for index, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def reference_dequantize(weight: Tensor, scale_inv: Tensor, block: int = 128) -> Tensor:
    """Dequantize FP8 blocks to bfloat16 element by element, as a slow oracle."""
    rows, columns = weight.shape
    row_scale = torch.arange(rows) // block
    column_scale = torch.arange(columns) // block
    return (weight.to(torch.float32) * scale_inv[row_scale][:, column_scale]).to(torch.bfloat16)


def _with_mtp(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    last, extra = 2, 3
    prefix = f"model.layers.{extra}."
    copied = {
        name.replace(f"model.layers.{last}.", prefix): t.clone()
        for name, t in tensors.items()
        if name.startswith(f"model.layers.{last}.")
    }
    hidden = tensors["model.norm.weight"].shape[0]
    own = {
        "enorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "hnorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "eh_proj.weight": torch.randn(hidden, 2 * hidden).to(torch.bfloat16),
        "embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        "shared_head.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "shared_head.head.weight": tensors["lm_head.weight"].clone(),
    }
    return {**tensors, **copied, **{prefix + name: tensor for name, tensor in own.items()}}


def _to_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the tensors that are FP8 in the releases; scales are powers of two, so that bfloat16 represents them exactly."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (not name.endswith("_proj.weight") and not name.endswith("_mqa.weight")) or "eh_proj" in name:
            result[name] = tensor
            continue
        rows, columns = tensor.shape
        grid = (-(-rows // 128), -(-columns // 128))
        scale = torch.empty(grid)
        weight = torch.empty(rows, columns)
        for i in range(grid[0]):
            for j in range(grid[1]):
                part = tensor[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].float()
                scale[i, j] = part.abs().max() / 448
                weight[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] = part / scale[i, j]
        result[name] = weight.to(torch.float8_e4m3fn)
        result[name + "_scale_inv"] = scale
    return result
