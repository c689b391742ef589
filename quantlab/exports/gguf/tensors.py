"""The tensors of a GGUF file: for each its name, type and shape, and the weights of the artifact that it is made of.

Legend: a weight [N, K] has N rows (outputs) and K columns (inputs); E experts of a layer; shapes are in torch's order, which
GGUF stores reversed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from quantlab.architectures.architecture import ModelTensor
from quantlab.architectures.config import Config
from quantlab.architectures.layer import GroupedAttention, LatentAttention, MixtureOfExperts
from quantlab.exports.gguf.refusal import RefusalError
from quantlab.exports.gguf.rotary import interleaved
from quantlab.formats.contents import Contents, Weight
from quantlab.numerics.number_format import NumberFormat

BlockType = Literal["Q4_0", "Q4_1", "Q8_0", "F16", "BF16", "F32"]
BLOCK: Final = 32
"""Consecutive columns that share a scale in the quantized types."""
BLOCK_BYTES: Final[Mapping[BlockType, tuple[int, int]]] = {
    "Q4_0": (BLOCK, 18),
    "Q4_1": (BLOCK, 20),
    "Q8_0": (BLOCK, 34),
    "F16": (1, 2),
    "BF16": (1, 2),
    "F32": (1, 4),
}
"""Columns and bytes of a block."""
ARCHITECTURES: Final[Mapping[str, str]] = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}
"""llama.cpp's architecture by the family's name."""
MOST_NAME_BYTES: Final = 63
"""Of a tensor's name; ggml's buffer has one more for its end."""

_LAYER, _ATTENTION, _MLP = "model.layers.{layer}.", "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
NAMES: Final[Mapping[str, str]] = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    _LAYER + "input_layernorm": "blk.{layer}.attn_norm",
    _LAYER + "post_attention_layernorm": "blk.{layer}.ffn_norm",
    _ATTENTION + "q_proj": "blk.{layer}.attn_q",
    _ATTENTION + "k_proj": "blk.{layer}.attn_k",
    _ATTENTION + "v_proj": "blk.{layer}.attn_v",
    _ATTENTION + "o_proj": "blk.{layer}.attn_output",
    _ATTENTION + "q_norm": "blk.{layer}.attn_q_norm",
    _ATTENTION + "k_norm": "blk.{layer}.attn_k_norm",
    _ATTENTION + "q_a_proj": "blk.{layer}.attn_q_a",
    _ATTENTION + "q_a_layernorm": "blk.{layer}.attn_q_a_norm",
    _ATTENTION + "q_b_proj": "blk.{layer}.attn_q_b",
    _ATTENTION + "kv_a_proj_with_mqa": "blk.{layer}.attn_kv_a_mqa",
    _ATTENTION + "kv_a_layernorm": "blk.{layer}.attn_kv_a_norm",
    _MLP + "gate_proj": "blk.{layer}.ffn_gate",
    _MLP + "up_proj": "blk.{layer}.ffn_up",
    _MLP + "down_proj": "blk.{layer}.ffn_down",
    _MLP + "gate": "blk.{layer}.ffn_gate_inp",
    _MLP + "experts.{expert}.gate_proj": "blk.{layer}.ffn_gate_exps",
    _MLP + "experts.{expert}.up_proj": "blk.{layer}.ffn_up_exps",
    _MLP + "experts.{expert}.down_proj": "blk.{layer}.ffn_down_exps",
    _MLP + "shared_experts.gate_proj": "blk.{layer}.ffn_gate_shexp",
    _MLP + "shared_experts.up_proj": "blk.{layer}.ffn_up_shexp",
    _MLP + "shared_experts.down_proj": "blk.{layer}.ffn_down_shexp",
}
"""Module names; `weight` or `bias` follows on both sides."""
_BIAS_OF_ROUTER: Final = (f"{_MLP}{MixtureOfExperts.ROUTER}.{MixtureOfExperts.BIAS}", "blk.{layer}.exp_probs_b.bias")
_LATENT_UP: Final = f"{_ATTENTION}{LatentAttention.LATENT_UP}.weight"
ROTARY_DIVISORS: Final = "rope_freqs.weight"
"""Holds the divisors of llama3's frequencies; of no weight."""
_DERIVED: Final = "rotary_emb.inv_freq"
"""End of the names of tensors of old checkpoints that config.json determines."""


@dataclass(frozen=True)
class HeadRows:
    """Some rows of every head of a matrix, in another order.

    Attributes:
        heads: number of heads.
        width: rows of a head.
        order: for every row of the result, the row of the head that it is.
    """

    heads: int
    width: int
    order: tuple[int, ...]

    def indices(self) -> list[int]:
        """For every row of the result, the row of the matrix that it is."""
        return [head * self.width + row for head in range(self.heads) for row in self.order]


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file.

    Attributes:
        name: its name.
        type: its type.
        shape: its dimensions.
        sources: names of the artifact's weights that are stacked in it.
        rows: the rows taken of each source; None for all as they are.
        transposed: whether the chosen rows of every head are transposed, which no quantized type can express.
    """

    name: str
    type: BlockType
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    rows: HeadRows | None = None
    transposed: bool = False

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Its dimensions in bytes: the last one is the bytes of a row."""
        columns, nbytes = BLOCK_BYTES[self.type]
        return (*self.shape[:-1], self.shape[-1] // columns * nbytes)


@dataclass(frozen=True)
class TensorPlan:
    """All tensors made of weights, and what happens to the weights.

    Attributes:
        tensors: in the order of the artifact.
        left_out: names of weights that are not written.
        notes: what a user must know.
    """

    tensors: tuple[GgufTensor, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


def plan_tensors(contents: Contents) -> TensorPlan:
    """The tensors of the file.

    Raises:
        RefusalError: a weight has no place or no type in GGUF.
        CheckpointError: config.json is not usable.
    """
    architecture = contents.architecture
    if architecture.name not in ARCHITECTURES:
        raise RefusalError(f"the family {architecture.name} is not written as GGUF")
    config = architecture.read(contents.config)
    stacks: dict[str, list[Weight]] = {}
    left_out = []
    for weight in contents.weights:
        if _is_left_out(weight.tensor, config):
            left_out.append(weight.name)
        else:
            stacks.setdefault(_target(weight.tensor), []).append(weight)
    tensors = [made for name, stack in stacks.items() for made in _made(name, stack, contents, config)]
    for made in tensors:
        if len(made.name.encode()) > MOST_NAME_BYTES:
            raise RefusalError(f"the name {made.name} has more than {MOST_NAME_BYTES} bytes")
    return TensorPlan(tuple(tensors), tuple(left_out), tuple(_notes(contents, tensors, left_out)))


def _is_left_out(tensor: ModelTensor, config: Config) -> bool:
    """Multi-token-prediction layers, the copy of a tied head, and tensors that config.json determines."""
    tied_head = tensor.name == "lm_head.weight" and config["tie_word_embeddings"]
    return tensor.role == "mtp" or bool(tied_head) or tensor.name.endswith(_DERIVED)


def _target(tensor: ModelTensor) -> str:
    """Name of the GGUF tensor that a weight belongs to; kv_b_proj belongs to two and keeps its own name here.

    Raises:
        RefusalError: it belongs to none.
    """
    if tensor.rule is None:
        raise RefusalError(f"{tensor.name} has no place in GGUF")
    pattern = tensor.rule.pattern
    if pattern == _LATENT_UP:
        return tensor.name
    if pattern == _BIAS_OF_ROUTER[0]:
        return _BIAS_OF_ROUTER[1].format(layer=tensor.layer)
    module, _, part = pattern.rpartition(".")
    if module not in NAMES:
        raise RefusalError(f"{tensor.name} has no place in GGUF")
    return f"{NAMES[module].format(layer=tensor.layer)}.{part}"


def _made(name: str, stack: Sequence[Weight], contents: Contents, config: Config) -> Iterator[GgufTensor]:
    weight = stack[0]
    tensor = weight.tensor
    assert tensor.rule is not None, "it has a target"
    if tensor.rule.pattern == _LATENT_UP:
        yield from _latent_halves(tensor, weight, config)
        return
    _check_bias(weight, contents)
    kind = _type_of(weight)
    rows = _rotary_rows(weight, contents, config)
    if tensor.expert is None:
        yield GgufTensor(name, kind, weight.shape, (weight.name,), rows)
        return
    by_expert = {other.tensor.expert: other for other in stack}
    for expert in range(config["n_routed_experts"]):
        other = by_expert.get(expert)
        if other is None or _type_of(other) != kind or other.shape != weight.shape:
            found = "missing" if other is None else f"{_type_of(other)} {list(other.shape)}"
            raise RefusalError(
                f"GGUF stores the experts of a layer as one tensor of one type: {weight.name} is {kind} "
                f"{list(weight.shape)}, expert {expert} is {found}"
            )
    sources = tuple(by_expert[expert].name for expert in range(config["n_routed_experts"]))
    yield GgufTensor(name, kind, (len(sources), *weight.shape), sources)


def _check_bias(weight: Weight, contents: Contents) -> None:
    """llama.cpp ignores no tensor of the file: it refuses one that the architecture lacks."""
    if not weight.name.endswith(".bias"):
        return
    attention = contents.architecture.attention
    inputs = isinstance(attention, GroupedAttention) and weight.module.endswith(
        (attention.QUERY, attention.KEY, attention.VALUE)
    )
    if not inputs and contents.architecture.name != "llama":
        raise RefusalError(f"llama.cpp has no place for {weight.name} in this family")


def _rotary_rows(weight: Weight, contents: Contents, config: Config) -> HeadRows | None:
    """The order of rows that puts rotated pairs side by side, where llama.cpp expects them so.

    It does in llama and deepseek2; in Qwen's families pairs are half a head apart, as in the checkpoint.
    """
    attention, module = contents.architecture.attention, weight.module.rpartition(".")[2]
    if isinstance(attention, GroupedAttention):
        heads = {attention.QUERY: "num_attention_heads", attention.KEY: "num_key_value_heads"}
        if contents.architecture.name != "llama" or module not in heads:
            return None
        return HeadRows(config[heads[module]], config["head_dim"], interleaved(config["head_dim"]))
    if attention.rotary(config).projected:
        return None
    rope = config["qk_rope_head_dim"]
    before = {
        attention.QUERY: config["qk_nope_head_dim"],
        attention.QUERY_UP: config["qk_nope_head_dim"],
        attention.LATENT_DOWN: config["kv_lora_rank"],
    }
    if module not in before:
        return None
    plain = before[module]
    order = (*range(plain), *(plain + row for row in interleaved(rope)))
    heads_of = 1 if module == attention.LATENT_DOWN else config["num_attention_heads"]
    return HeadRows(heads_of, plain + rope, order)


def _latent_halves(tensor: ModelTensor, weight: Weight, config: Config) -> Iterator[GgufTensor]:
    """kv_b_proj [H (nope + value), R] as attn_k_b [H, R, nope], which multiplies queries, and attn_v_b [H, value, R].

    The groups of a quantized kv_b run along R, so its keys are stored expanded.
    """
    heads, keys, values = config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"]
    rank, prefix = config["kv_lora_rank"], f"blk.{tensor.layer}.attn_"
    of_keys = HeadRows(heads, keys + values, tuple(range(keys)))
    of_values = HeadRows(heads, keys + values, tuple(range(keys, keys + values)))
    kind, sources = _type_of(weight), (weight.name,)
    yield GgufTensor(f"{prefix}k_b.weight", _float(weight), (heads, rank, keys), sources, of_keys, transposed=True)
    yield GgufTensor(f"{prefix}v_b.weight", kind, (heads, values, rank), sources, of_values)


def _type_of(weight: Weight) -> BlockType:
    """The type that stores a weight without another rounding.

    Raises:
        RefusalError: there is none.
    """
    if weight.number is None or not weight.number.is_integer:
        return _float(weight)
    kind = _integer_type(weight.number)
    if kind is None:
        raise RefusalError(f"GGUF has no type for {weight.number.name} ({weight.name})")
    columns = weight.shape[1]
    if (weight.number.group_size or columns) % BLOCK:
        what = f"groups of {weight.number.group_size}" if weight.number.group_size else f"{columns} columns"
        raise RefusalError(f"{kind} has blocks of {BLOCK} columns, which do not divide {what} of {weight.name}")
    return kind


def _integer_type(number: NumberFormat) -> BlockType | None:
    if number.granularity.rows != 1:
        return None
    match number.bits, number.symmetric:
        case 4, True:
            return "Q4_0"
        case 4, False:
            return "Q4_1"
        case 8, True:
            return "Q8_0"
    return None


def _float(weight: Weight) -> BlockType:
    """The type of a weight in floating point: vectors and routers float32, others their own dtype, FP8 bfloat16."""
    if weight.number is not None and not weight.number.is_integer:
        return "BF16"
    if len(weight.shape) == 1 or weight.role == "router":
        return "F32"
    match weight.dtype:
        case "F16":
            return "F16"
        case "BF16":
            return "BF16"
        case "F32":
            return "F32"
    raise RefusalError(f"GGUF has no type for {weight.dtype} ({weight.name})")


def _notes(contents: Contents, tensors: Sequence[GgufTensor], left_out: Sequence[str]) -> Iterator[str]:
    wide = sum(_is_wide(weight) for weight in contents.weights)
    if wide:
        yield (
            f"{wide} matrices have scales for more than {BLOCK} columns, which the blocks of GGUF repeat: the same integers, "
            "but 4.5 bits per weight in Q4_0, 5 in Q4_1 and 8.5 in Q8_0"
        )
    rounded = sum(weight.number is not None and weight.number.activations is not None for weight in contents.quantized)
    if rounded:
        yield (
            f"the inputs of {rounded} matrices are int8 with one scale per token in the artifact; llama.cpp rounds the inputs "
            f"of every quantized matrix to int8 with one scale per {BLOCK} columns"
        )
    expanded = sum(weight.number is not None and not weight.number.is_integer for weight in contents.weights)
    if expanded:
        yield f"{expanded} FP8 matrices are expanded to bfloat16"
    keys = sum(tensor.transposed for tensor in tensors)
    quantized = {weight.name for weight in contents.quantized}
    if any(tensor.transposed and tensor.sources[0] in quantized for tensor in tensors):
        yield f"the keys' half of kv_b is stored expanded in {keys} layers: llama.cpp wants it transposed, across the groups"
    layers = {
        name.split(".")[2] for name in left_out if name.startswith("model.layers.") and not name.endswith(_DERIVED)
    }
    if layers:
        yield f"{len(layers)} multi-token-prediction layer{'s' if len(layers) > 1 else ''} left out: llama.cpp's converter leaves them out too"


def _is_wide(weight: Weight) -> bool:
    number = weight.number
    return number is not None and number.is_integer and (number.group_size or BLOCK + 1) > BLOCK
