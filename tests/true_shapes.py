"""Configs of the released models, and checkpoints with true shapes that consist of headers only, for plans."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantlab.architectures.detect import detect

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
DISTILL_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
}  # fmt: skip
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936,
    "attention_bias": False, "tie_word_embeddings": False, "max_position_embeddings": 131072, "rope_theta": 1000000,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attn_factor": 0.8782488562869419,
    },
}  # fmt: skip
CODER_7B = LLM_7B | {"num_hidden_layers": 32, "vocab_size": 32256}

_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


def write_headers(directory: Path, config: Mapping[str, Any], *, shards: int, fp8: bool = False) -> Path:
    """Write a checkpoint whose shards have headers, and sparse holes instead of weights.

    Args:
        directory: created here.
        config: the fields of config.json that the plan reads.
        shards: number of files.
        fp8: store linears as FP8 blocks with scales, as in DeepSeek-V3's release.
    """
    directory.mkdir(parents=True)
    config = {**config, "torch_dtype": "bfloat16"}
    if fp8:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (directory / "config.json").write_text(json.dumps(config))
    architecture = detect(config)
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    for name, shape in architecture.expected(config, with_mtp=True):
        rule = architecture.classify(name, hidden_layers=config["num_hidden_layers"]).rule
        assert rule is not None
        if fp8 and rule.linear:
            tensors.append((name, "F8_E4M3", shape))
            tensors.append((name + "_scale_inv", "F32", (-(-shape[0] // 128), -(-shape[1] // 128))))
        else:
            tensors.append((name, "F32" if rule.exact else "BF16", shape))
    weight_map = {}
    for index in range(shards):
        header, position, file = {}, 0, f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        for name, dtype, shape in tensors[index * len(tensors) // shards : (index + 1) * len(tensors) // shards]:
            end = position + math.prod(shape) * _BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
            position, weight_map[name] = end, file
        text = json.dumps(header).encode()
        with (directory / file).open("wb") as shard:
            shard.write(len(text).to_bytes(8, "little") + text)
            shard.truncate(8 + len(text) + position)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory
