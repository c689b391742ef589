"""Keys and values of a GGUF file: the model's sizes, attention, routing and tokenizer in llama.cpp's terms."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from quantlab.architectures.config import Config
from quantlab.architectures.fields import ReadConfig
from quantlab.architectures.layer import LatentAttention, Routing
from quantlab.exports.gguf.refusal import RefusalError
from quantlab.exports.gguf.rotary import Rotary, read_rotary
from quantlab.exports.gguf.tensors import ARCHITECTURES, BlockType, GgufTensor
from quantlab.exports.gguf.tokenizer import Vocabulary
from quantlab.formats.contents import Contents

Kind = Literal["string", "uint32", "float32", "bool", "strings", "int32s", "float32s"]
_FILE_TYPES: Final[Mapping[BlockType, int]] = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
_QUANTIZATION_VERSION: Final = 2
_GATING: Final = {"softmax": 1, "sigmoid": 2}
_LEADING_DENSE: Final = "leading_dense_block_count"
_WITHOUT_QUERY_LATENT: Final = {26, 27}
"""Numbers of layers by which llama.cpp recognises a model without query latent (V2-Lite), whatever the file says."""
_MOST_LAYERS, _MOST_EXPERTS = 512, 1024


@dataclass(frozen=True)
class Entry:
    """One key with its value.

    Attributes:
        key: its full name.
        kind: how the value is stored.
        value: text, number, or a sequence of them.
    """

    key: str
    kind: Kind
    value: Any = field(repr=False)


def model_entries(contents: Contents, *, name: str, tensors: Sequence[GgufTensor]) -> tuple[Entry, ...]:
    """The keys of the model.

    Args:
        contents: the artifact.
        name: a name for readers.
        tensors: all tensors of the file.

    Raises:
        RefusalError: llama.cpp computes no such model.
        CheckpointError: config.json is not usable.
    """
    config = contents.architecture.read(contents.config)
    word = ARCHITECTURES[contents.architecture.name]
    general = (
        Entry("general.name", "string", name),
        Entry("general.file_type", "uint32", _FILE_TYPES[_most(tensors)]),
        Entry("general.quantization_version", "uint32", _QUANTIZATION_VERSION),
    )
    own = [*_common(contents, config), *_attention(contents, config), *_routing(contents, config)]
    return (*general, *(Entry(f"{word}.{key}", kind, value) for key, kind, value in own))


def vocabulary_entries(vocabulary: Vocabulary | None) -> tuple[Entry, ...]:
    """The keys of the tokenizer; None for a model without one, which llama.cpp runs on token numbers alone."""
    if vocabulary is None:
        return (Entry("tokenizer.ggml.model", "string", "none"),)
    template = vocabulary.chat_template
    templates = template if isinstance(template, Mapping) else {} if template is None else {"default": template}
    return (
        Entry("tokenizer.ggml.model", "string", vocabulary.model),
        Entry("tokenizer.ggml.pre", "string", vocabulary.pre),
        Entry("tokenizer.ggml.tokens", "strings", vocabulary.tokens),
        Entry("tokenizer.ggml.token_type", "int32s", tuple(map(int, vocabulary.types))),
        *([Entry("tokenizer.ggml.merges", "strings", vocabulary.merges)] if vocabulary.model == "gpt2" else []),
        *([Entry("tokenizer.ggml.scores", "float32s", vocabulary.scores)] if vocabulary.scores else []),
        *(Entry(f"tokenizer.ggml.{word}_token_id", "uint32", token) for word, token in vocabulary.special.items()),
        Entry("tokenizer.ggml.add_bos_token", "bool", vocabulary.adds_beginning),
        Entry("tokenizer.ggml.add_eos_token", "bool", False),
        *([Entry("tokenizer.ggml.add_space_prefix", "bool", vocabulary.spaces.prefixes)] if vocabulary.spaces else []),
        *(
            Entry("tokenizer.chat_template" + ("" if each == "default" else f".{each}"), "string", text)
            for each, text in templates.items()
        ),
        *([Entry("tokenizer.chat_templates", "strings", tuple(templates))] if len(templates) > 1 else []),
    )


def rotary_of(contents: Contents) -> Rotary:
    """The rotary embedding of a model.

    Raises:
        RefusalError: llama.cpp does not compute it.
    """
    config = contents.architecture.for_transformers(contents.config)
    latent = isinstance(contents.architecture.attention, LatentAttention)
    return read_rotary(config, width=config["qk_rope_head_dim" if latent else "head_dim"], latent=latent)


Own = Iterator[tuple[str, Kind, Any]]


def _most(tensors: Sequence[GgufTensor]) -> BlockType:
    """The type of most weights of the layers."""
    counted: Counter[BlockType] = Counter()
    for tensor in tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            counted[tensor.type] += tensor.elements
    return counted.most_common(1)[0][0] if counted else "F32"


def _common(contents: Contents, config: ReadConfig) -> Own:
    context = contents.architecture.context_length(config)
    if not context:
        raise RefusalError("llama.cpp needs a context length, config.json has no max_position_embeddings")
    if config["num_hidden_layers"] > _MOST_LAYERS:
        raise RefusalError(f"llama.cpp has at most {_MOST_LAYERS} layers, the model has {config['num_hidden_layers']}")
    if config["hidden_act"] not in {"silu", "swish"}:
        raise RefusalError(f"llama.cpp computes silu in this family, the model {config['hidden_act']}")
    latent = isinstance(contents.architecture.attention, LatentAttention)
    yield "context_length", "uint32", context
    yield "embedding_length", "uint32", config["hidden_size"]
    yield "block_count", "uint32", config["num_hidden_layers"]
    yield "feed_forward_length", "uint32", config["intermediate_size"]
    yield "attention.head_count", "uint32", config["num_attention_heads"]
    key_heads = 1 if latent else config["num_key_value_heads"]  # every query head reads the one latent
    yield "attention.head_count_kv", "uint32", key_heads
    yield "attention.layer_norm_rms_epsilon", "float32", config["rms_norm_eps"]
    yield "vocab_size", "uint32", config["vocab_size"]


def _attention(contents: Contents, config: ReadConfig) -> Own:
    attention = contents.architecture.attention
    window = attention.window(config)
    if window is not None:
        raise RefusalError(
            f"llama.cpp computes no attention windows in this family, the model has one of {window} tokens"
        )
    if isinstance(attention, LatentAttention):
        yield from _latent(config)
        width = config["qk_rope_head_dim"]
    else:
        width = config["head_dim"]
        if contents.architecture.name == "qwen2" and width * config["num_attention_heads"] != config["hidden_size"]:
            raise RefusalError(
                f"llama.cpp's qwen2 has heads as wide as hidden_size together, this model's have {width} each"
            )
        yield "attention.key_length", "uint32", width
        yield "attention.value_length", "uint32", width
    yield "rope.dimension_count", "uint32", width
    rotary = rotary_of(contents)
    yield "rope.freq_base", "float32", rotary.theta
    if rotary.kind in {"linear", "yarn"}:
        yield "rope.scaling.type", "string", rotary.kind
        yield "rope.scaling.factor", "float32", rotary.factor
    if rotary.kind == "yarn":
        yield "rope.scaling.original_context_length", "uint32", rotary.original_context
        if rotary.log_multiplier:
            yield "rope.scaling.yarn_log_multiplier", "float32", 0.1 * rotary.log_multiplier  # llama.cpp divides by 0.1
        else:
            yield "rope.scaling.attn_factor", "float32", rotary.attention


def _latent(config: Config) -> Own:
    """llama.cpp attends to the latent itself: queries are multiplied by the keys' half of kv_b beforehand, and the attended
    latent by the values' half. Keys and values are therefore as wide as the latent."""
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    query = config["q_lora_rank"] or 0
    if query and config["num_hidden_layers"] in _WITHOUT_QUERY_LATENT:
        raise RefusalError(
            f"llama.cpp reads a model of {config['num_hidden_layers']} layers as one without query latent"
        )
    yield "attention.q_lora_rank", "uint32", query
    yield "attention.kv_lora_rank", "uint32", rank
    yield "attention.key_length", "uint32", rank + rope
    yield "attention.value_length", "uint32", rank
    yield "attention.key_length_mla", "uint32", config["qk_nope_head_dim"] + rope
    yield "attention.value_length_mla", "uint32", config["v_head_dim"]


def _routing(contents: Contents, config: ReadConfig) -> Own:
    if contents.architecture.mixture is None:
        return
    routing = contents.architecture.mixture.routing(config)
    grouped = routing.groups > 1 and routing.top_groups < routing.groups
    _check_routing(routing, grouped=grouped)
    if not config["n_shared_experts"]:
        raise RefusalError("llama.cpp's deepseek2 has shared experts, the model has none")
    yield _LEADING_DENSE, "uint32", min(config["first_k_dense_replace"], config["num_hidden_layers"])
    yield "expert_count", "uint32", routing.experts
    yield "expert_used_count", "uint32", routing.top_k
    yield "expert_shared_count", "uint32", config["n_shared_experts"]
    yield "expert_feed_forward_length", "uint32", config["moe_intermediate_size"]
    yield "expert_weights_scale", "float32", routing.scaling
    yield "expert_weights_norm", "bool", routing.normalised
    yield "expert_gating_func", "uint32", _GATING[routing.scoring]
    if grouped:
        yield "expert_group_count", "uint32", routing.groups
        yield "expert_group_used_count", "uint32", routing.top_groups


def _check_routing(routing: Routing, *, grouped: bool) -> None:
    if routing.experts > _MOST_EXPERTS:
        raise RefusalError(f"llama.cpp has at most {_MOST_EXPERTS} experts per layer, the model has {routing.experts}")
    if grouped and routing.group_score != 2:
        raise RefusalError(
            "llama.cpp scores a routing group by the sum of its two best experts, "
            f"this model by {'its best expert' if routing.group_score == 1 else 'another rule'}: other experts would be chosen"
        )
    if grouped and (routing.experts // routing.groups < 2 or routing.groups >= routing.experts):
        raise RefusalError("llama.cpp's routing groups have at least two experts, this model's have one")
