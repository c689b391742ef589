"""How the decoder layers of a family compute: attention, router, and the names of their modules.

Every layer is two sublayers that add to the residual stream x,

    x  <-  x + self_attn(input_layernorm(x))        x  <-  x + mlp(post_attention_layernorm(x))

with the module names of transformers. Code that computes with a layer reads these declarations; it never asks a module or a
config.json which family it is of.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from quantlab.architectures.config import Config, size_of


@dataclass(frozen=True)
class Sublayer:
    """One half of a decoder layer: ``x + module(norm(x))``.

    Attributes:
        norm: name of the RMS norm in the layer.
        module: name of the module in the layer.
        stages: the input sites of its linears in the order its forward pass reaches them; those of one stage do not depend
            on each other.
    """

    norm: str
    module: str
    stages: tuple[tuple[str, ...], ...]


ATTENTION = Sublayer("input_layernorm", "self_attn", (("attention",), ("q_latent", "kv_latent"), ("o",)))
MLP = Sublayer("post_attention_layernorm", "mlp", (("mlp",), ("down",)))


@dataclass(frozen=True)
class GatedMlp:
    """Names of the linears of ``down(act(gate(x)) * up(x))``, and of the activation function."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"


GATED_MLP = GatedMlp()


@dataclass(frozen=True)
class RotaryLayout:
    """Where the two numbers that a rotary embedding rotates together lie in a head.

    Attributes:
        projected: whether they are neighbours in the output of the projection; else half the width apart.
        cached: the same, of the rotated keys in the cache.
    """

    projected: bool
    cached: bool


@dataclass(frozen=True)
class HeadNorms:
    """Names of the RMS norms of every head of queries and keys, applied before the rotation."""

    query: str = "q_norm"
    key: str = "k_norm"


def no_window(config: Config) -> int | None:
    """No layer attends to less than the whole context."""
    return None


@dataclass(frozen=True)
class GroupedAttention:
    """Grouped-query attention (arXiv 2305.13245); rotated numbers lie half a head apart.

    Attributes:
        head_norms: the norms of each head of queries and keys, None without.
        window: tokens that the layer with the shortest attention sees, None where all see the whole context.
    """

    QUERY: ClassVar = "q_proj"
    KEY: ClassVar = "k_proj"
    VALUE: ClassVar = "v_proj"
    OUTPUT: ClassVar = "o_proj"

    head_norms: HeadNorms | None = None
    window: Callable[[Config], int | None] = no_window

    def output_rows(self, config: Config, *, channels: int) -> Sequence[int]:
        """For each of the `channels` inputs of the output projection the row of the value projection it comes from."""
        heads = size_of(config, "num_attention_heads", least=1)
        shared_by = heads // size_of(config, "num_key_value_heads", default=heads, least=1)
        width = channels // heads
        return [head // shared_by * width + row for head in range(heads) for row in range(width)]


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), with a latent of queries or without.

    Attributes:
        rotary: where rotated numbers lie.
    """

    QUERY: ClassVar = "q_proj"
    QUERY_DOWN: ClassVar = "q_a_proj"
    QUERY_NORM: ClassVar = "q_a_layernorm"
    QUERY_UP: ClassVar = "q_b_proj"
    LATENT_DOWN: ClassVar = "kv_a_proj_with_mqa"
    LATENT_NORM: ClassVar = "kv_a_layernorm"
    LATENT_UP: ClassVar = "kv_b_proj"
    OUTPUT: ClassVar = "o_proj"

    rotary: Callable[[Config], RotaryLayout]

    @property
    def window(self) -> Callable[[Config], int | None]:
        """Tokens that the layer with the shortest attention sees, None where all see the whole context."""
        return no_window

    def query_rank(self, config: Config) -> int:
        """Width of the latent of queries; 0 where queries are projected at once."""
        return size_of(config, "q_lora_rank", default=0)

    def output_rows(self, config: Config, *, channels: int) -> Sequence[int]:
        """For each of the `channels` inputs of the output projection the row of `LATENT_UP` it comes from.

        The rows of each head are those of its keys and, below them, those of its values.
        """
        heads, keys = size_of(config, "num_attention_heads", least=1), size_of(config, "qk_nope_head_dim")
        width = channels // heads
        return [head * (keys + width) + keys + row for head in range(heads) for row in range(width)]


Attention = GroupedAttention | LatentAttention


@dataclass(frozen=True)
class Routing:
    """How a router chooses k of E experts for a token and weighs them.

    Attributes:
        experts: E.
        top_k: k.
        groups: equal groups that the experts are divided into, in order; 1 without groups.
        top_groups: groups that a token may choose from.
        group_score: how many of a group's best scores are summed to choose groups; 0 without groups.
        scoring: the function of the logits whose values are the scores.
        corrected: whether a bias is added to the scores for the choice; the weights are the scores without it.
        normalised: whether the k weights are divided by their sum.
        scaling: factor of the weights.
    """

    experts: int
    top_k: int
    groups: int = 1
    top_groups: int = 1
    group_score: int = 0
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    corrected: bool = False
    normalised: bool = False
    scaling: float = 1.0


@dataclass(frozen=True)
class MixtureOfExperts:
    """The mlp of a layer with routed experts and a shared one, whose outputs are summed.

    transformers calls its experts as ``experts(hidden_states, top_k_index, top_k_weights)``, and the weights of routed and
    shared experts have the names of `GatedMlp`.

    Attributes:
        routing: reads the routing out of a config.json of the family.
        count_field: the field of config.json that holds the number of routed experts.
    """

    EXPERTS: ClassVar = "experts"
    SHARED: ClassVar = "shared_experts"
    ROUTER: ClassVar = "gate"
    BIAS: ClassVar = "e_score_correction_bias"
    ROUTED: ClassVar = ("logits", "weights", "index")
    """Order of the router's outputs: logits [T, E], weights [T, k], numbers of the experts [T, k]."""

    routing: Callable[[Config], Routing]
    count_field: str = "n_routed_experts"
