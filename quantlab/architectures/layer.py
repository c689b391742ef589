"""How the decoder layers of a family compute: attention, router, and the names of their modules.

Every layer is two sublayers that add to the residual stream x,

    x  <-  x + self_attn(input_layernorm(x))        x  <-  x + mlp(post_attention_layernorm(x))

with the module names of transformers. Code that computes with a layer reads these declarations instead of checking the
family of a module or config.json.
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
    """Positions in a head of the two numbers that a rotary embedding rotates together.

    Attributes:
        projected: whether they are adjacent in the output of the projection (interleaved); else half the width apart.
        cached: the same for the rotated keys in the cache.
    """

    projected: bool
    cached: bool


@dataclass(frozen=True)
class HeadNorms:
    """Names of the per-head RMS norms of queries and keys, applied before the rotary embedding."""

    query: str = "q_norm"
    key: str = "k_norm"


def no_window(config: Config) -> int | None:
    """None: every layer attends to the whole context."""
    return None


@dataclass(frozen=True)
class GroupedAttention:
    """Grouped-query attention (arXiv 2305.13245); pairs of rotated numbers are half a head apart.

    Attributes:
        head_norms: per-head norms of queries and keys, None if there are none.
        window: smallest attention window of any layer in tokens, None if all layers attend to the whole context.
    """

    QUERY: ClassVar = "q_proj"
    KEY: ClassVar = "k_proj"
    VALUE: ClassVar = "v_proj"
    OUTPUT: ClassVar = "o_proj"

    head_norms: HeadNorms | None = None
    window: Callable[[Config], int | None] = no_window

    def output_rows(self, config: Config, *, channels: int) -> Sequence[int]:
        """For each of the `channels` inputs of the output projection: the value projection's row that produces it."""
        heads = size_of(config, "num_attention_heads", least=1)
        shared_by = heads // size_of(config, "num_key_value_heads", default=heads, least=1)
        width = channels // heads
        return [head // shared_by * width + row for head in range(heads) for row in range(width)]


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), with or without a query latent.

    Attributes:
        rotary: positions of the rotated numbers in a head.
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
        """Smallest attention window of any layer in tokens, None if all layers attend to the whole context."""
        return no_window

    def query_rank(self, config: Config) -> int:
        """Width of the query latent; 0 if queries are projected directly."""
        return size_of(config, "q_lora_rank", default=0)

    def output_rows(self, config: Config, *, channels: int) -> Sequence[int]:
        """For each of the `channels` inputs of the output projection: the row of `LATENT_UP` that produces it.

        The rows of each head are those of its keys, then those of its values.
        """
        heads, keys = size_of(config, "num_attention_heads", least=1), size_of(config, "qk_nope_head_dim")
        width = channels // heads
        return [head * (keys + width) + keys + row for head in range(heads) for row in range(width)]


Attention = GroupedAttention | LatentAttention


@dataclass(frozen=True)
class Routing:
    """How a router selects k of E experts for a token, and their weights.

    Attributes:
        experts: E.
        top_k: k.
        groups: number of equal, consecutive groups of experts; 1 without groups.
        top_groups: number of groups selected per token.
        group_score: number of best scores of a group that are summed to its score; 0 if no scores of groups are computed.
        scoring: function that maps the logits to scores.
        corrected: whether a bias is added to the scores for the selection; the weights are scores without the bias.
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
        routing: reads the routing from a config.json of the family.
        count_field: the field of config.json with the number of routed experts.
    """

    EXPERTS: ClassVar = "experts"
    SHARED: ClassVar = "shared_experts"
    ROUTER: ClassVar = "gate"
    BIAS: ClassVar = "e_score_correction_bias"
    ROUTED: ClassVar = ("logits", "weights", "index")
    """Order of the router's outputs: logits [T, E], weights [T, k], numbers of the experts [T, k]."""

    routing: Callable[[Config], Routing]
    count_field: str = "n_routed_experts"
