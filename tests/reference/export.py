"""Write a trained model as DeepSeek releases V3: FP8 blocks with inverse scales, per-expert names, several shards.

A shard is closed when it is full, so the scale of its last weight may be in the next shard, as in the releases; readers
must look names up in the index.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
from model import ModelConfig
from safetensors.torch import save_file
from torch import Tensor

from quantlab.numerics.fp8 import dequantize_blocks, quantize_blocks

BLOCK = (128, 128)
SHARDS = 5
_FP8 = re.compile(r"(self_attn\.(q_a|q_b|kv_b|o)_proj|kv_a_proj_with_mqa|mlp\..*(gate|up|down)_proj)\.weight$")
_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up|down)_proj$")


def released_names(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Float32 tensors under the released names: one per expert, the MTP layer with its copies of embedding and head."""
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = _EXPERTS.match(name)
        if match is None:
            named[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            stem = f"{match[1]}.{expert}"
            if match[2] == "down":
                named[f"{stem}.down_proj.weight"] = matrix
            else:
                gate, up = matrix.chunk(2, dim=0)
                named[f"{stem}.gate_proj.weight"], named[f"{stem}.up_proj.weight"] = gate, up
    named[f"model.layers.{layers}.embed_tokens.weight"] = state["model.embed_tokens.weight"]
    named[f"model.layers.{layers}.shared_head.head.weight"] = state["lm_head.weight"]
    return named


def is_fp8(name: str) -> bool:
    """Whether the releases keep this tensor in FP8."""
    return _FP8.search(name) is not None


def released_tensors(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as stored: FP8 with `_scale_inv`, the router's bias in float32, everything else in BF16."""
    stored: dict[str, Tensor] = {}
    for name, tensor in named.items():
        if is_fp8(name):
            stored[name], stored[f"{name}_scale_inv"] = quantize_blocks(tensor.detach().cpu(), block=BLOCK)
        elif name.endswith("e_score_correction_bias"):
            stored[name] = tensor.detach().cpu().float()
        else:
            stored[name] = tensor.detach().cpu().to(torch.bfloat16)
    return stored


def rounded_state(state: dict[str, Tensor], *, fp8: bool) -> dict[str, Tensor]:
    """The state after storage: every matrix rounded to BF16, or through FP8 blocks and then to BF16."""
    result = {}
    for name, tensor in state.items():
        matrices = tensor.detach().cpu().float()
        if name.endswith("e_score_correction_bias"):
            result[name] = matrices
        elif fp8 and (is_fp8(name) or _EXPERTS.match(name)):
            flat = matrices.reshape(-1, *matrices.shape[-2:])
            parts = [torch.cat([_through_fp8(part) for part in _parts(name, matrix)]) for matrix in flat]
            result[name] = torch.stack(parts).view_as(matrices)
        else:
            result[name] = matrices.to(torch.bfloat16).float()
    return result


def _parts(name: str, matrix: Tensor) -> tuple[Tensor, ...]:
    return matrix.chunk(2, dim=0) if name.endswith("gate_up_proj") else (matrix,)


def _through_fp8(matrix: Tensor) -> Tensor:
    weight, scale_inv = quantize_blocks(matrix, block=BLOCK)
    return dequantize_blocks(weight, scale_inv, block=BLOCK, dtype=torch.bfloat16).float()


def hf_config(config: ModelConfig) -> dict[str, object]:
    """config.json with the fields of DeepSeek-V3's own."""
    sizes = {key: value for key, value in asdict(config).items() if key != "rope_theta"}
    fixed = {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
        "initializer_range": 0.02, "max_position_embeddings": 2048, "model_type": "deepseek_v3", "moe_layer_freq": 1,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_key_value_heads": config.num_attention_heads,
        "num_nextn_predict_layers": 1, "pretraining_tp": 1,
        "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                                "weight_block_size": list(BLOCK)},
        "rope_scaling": None, "rope_theta": int(config.rope_theta), "scoring_func": "sigmoid",
        "tie_word_embeddings": False, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True,
    }  # fmt: skip
    return dict(sorted({**sizes, **fixed}.items()))


def _storage_order(name: str) -> tuple[int, list[str | int]]:
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    place = 1 + int(layer[1]) if layer else {"model.embed_tokens.weight": 0}.get(name, 10_000)
    return place, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def shard(stored: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Tensors in storage order; a new shard starts when the current one has its fraction of the bytes."""
    total = sum(tensor.nbytes for tensor in stored.values())
    shards: list[dict[str, Tensor]] = [{}]
    written = 0
    for name in sorted(stored, key=_storage_order):
        if written >= total * len(shards) / SHARDS and len(shards) < SHARDS:
            shards.append({})
        shards[-1][name] = stored[name].contiguous()
        written += stored[name].nbytes
    return shards


def export(state: dict[str, Tensor], config: ModelConfig, folder: Path) -> None:
    """Write weights, index, config.json and generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = released_tensors(released_names(state, config.num_hidden_layers))
    shards = shard(stored)
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in stored.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=0, separators=(",", ":")) + "\n")
    (folder / "config.json").write_text(json.dumps(hf_config(config), indent=2) + "\n")
    generation = {"_from_model_config": True, "bos_token_id": 0, "do_sample": True, "eos_token_id": 1,
                  "temperature": 0.7, "top_p": 0.9}  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
