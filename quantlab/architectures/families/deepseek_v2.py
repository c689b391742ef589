"""DeepSeek-V2 and V2-Lite: softmax routers, with groups of experts in the larger model (arXiv 2405.04434)."""

from typing import Final

from quantlab.architectures.architecture import Architecture, Dimensions
from quantlab.architectures.config import Config
from quantlab.architectures.fields import DEFAULT, Number, ReadConfig, Size, Switch, Word
from quantlab.architectures.known_fields import MLP_BIAS, dense_layers, latent_fields, shared_experts, with_key_heads
from quantlab.architectures.layer import LatentAttention, MixtureOfExperts, RotaryLayout, Routing
from quantlab.architectures.rules import LATENT, latent_dimensions

_LIMITED: Final = "group_limited_greedy"


def _dimensions(config: ReadConfig) -> Dimensions:
    return latent_dimensions(config, bias_corrected=False, mlp_bias=config["mlp_bias"])


def _rotary(config: Config) -> RotaryLayout:
    return RotaryLayout(projected=True, cached=True)


def _routing(config: Config) -> Routing:
    """A group's score is that of its best expert."""
    read = FIELDS.field
    groups = read("n_group").of(config) if read("topk_method").of(config) == _LIMITED else 1
    return Routing(
        experts=read("n_routed_experts").of(config),
        top_k=read("num_experts_per_tok").of(config),
        groups=groups,
        top_groups=read("topk_group").of(config) if groups > 1 else 1,
        group_score=1 if groups > 1 else 0,
        scaling=read("routed_scaling_factor").of(config),
    )


FIELDS: Final = latent_fields(
    shared_experts(2),
    dense_layers(0),
    MLP_BIAS,
    Switch(name="rope_interleave", default=True, computed=(True,)),
    Word(name="topk_method", default="greedy", computed=("greedy", _LIMITED)),
    Word(name="scoring_func", default="softmax", computed=("softmax",)),
    Switch(name="norm_topk_prob", default=False, computed=(False,)),
    Size(name="num_experts_per_tok", default=6),  # in every release; transformers has no default
    Size(name="n_group", default=1, null=DEFAULT),
    Size(name="topk_group", default=1, null=DEFAULT),
    Number(name="routed_scaling_factor", default=1.0),
    routing=_routing,
    whole_heads=True,
)
DEEPSEEK_V2 = Architecture(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    FIELDS,
    LATENT,
    _dimensions,
    LatentAttention(_rotary),
    mixture=MixtureOfExperts(_routing),
    adapted=with_key_heads,
)
