"""DeepSeek-V3 and R1: sigmoid routers with a correction bias, and multi-token-prediction layers (arXiv 2412.19437)."""

from typing import Final

from quantlab.architectures.architecture import Architecture, Dimensions
from quantlab.architectures.config import Config
from quantlab.architectures.fields import DEFAULT, Number, ReadConfig, Size, Switch, Word
from quantlab.architectures.known_fields import dense_layers, latent_fields, shared_experts, with_key_heads
from quantlab.architectures.layer import LatentAttention, MixtureOfExperts, RotaryLayout, Routing
from quantlab.architectures.rules import LATENT, MTP, latent_dimensions


def _dimensions(config: ReadConfig) -> Dimensions:
    return latent_dimensions(config, bias_corrected=True)


def _rotary(config: Config) -> RotaryLayout:
    return RotaryLayout(projected=FIELDS.field("rope_interleave").of(config), cached=False)


def _routing(config: Config) -> Routing:
    """The score of a group is the sum of its two best experts' scores, also if there is one group."""
    read = FIELDS.field
    groups = read("n_group").of(config)
    return Routing(
        experts=read("n_routed_experts").of(config),
        top_k=read("num_experts_per_tok").of(config),
        groups=groups,
        top_groups=read("topk_group").of(config),
        group_score=2,
        scoring="sigmoid",
        corrected=True,
        normalised=read("norm_topk_prob").of(config),
        scaling=read("routed_scaling_factor").of(config),
    )


FIELDS: Final = latent_fields(
    shared_experts(1),
    dense_layers(3),
    Switch(name="rope_interleave", default=True),
    Word(name="topk_method", default="noaux_tc", computed=("noaux_tc",)),
    Word(name="scoring_func", default="sigmoid", computed=("sigmoid",)),
    Switch(name="norm_topk_prob", default=True),
    Size(name="num_experts_per_tok", default=8, null=DEFAULT),
    Size(name="n_group", default=8, null=DEFAULT),
    Size(name="topk_group", default=4, null=DEFAULT),
    Number(name="routed_scaling_factor", default=2.5),
    routing=_routing,
    whole_heads=False,
)
DEEPSEEK_V3 = Architecture(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    FIELDS,
    LATENT + MTP,
    _dimensions,
    LatentAttention(_rotary),
    mixture=MixtureOfExperts(_routing),
    adapted=with_key_heads,
    mtp=True,
)
