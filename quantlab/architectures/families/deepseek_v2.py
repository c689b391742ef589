"""DeepSeek-V2 and V2-Lite: softmax routers, with groups of experts in the larger model (arXiv 2405.04434)."""

from quantlab.architectures.architecture import Architecture, Dimensions
from quantlab.architectures.config import Config, number_of, size_of
from quantlab.architectures.layer import LatentAttention, MixtureOfExperts, RotaryLayout, Routing
from quantlab.architectures.rules import LATENT, latent_dimensions, with_number_of_shared_experts


def _dimensions(config: Config) -> Dimensions:
    return latent_dimensions(config, bias_corrected=False)


def _rotary(config: Config) -> RotaryLayout:
    return RotaryLayout(projected=True, cached=True)


def _routing(config: Config) -> Routing:
    """A group's score is that of its best expert. transformers ignores `norm_topk_prob`, false in the releases."""
    limited = config.get("topk_method") == "group_limited_greedy"
    groups = (size_of(config, "n_group", default=1) or 1) if limited else 1
    return Routing(
        experts=size_of(config, "n_routed_experts", default=0),
        top_k=size_of(config, "num_experts_per_tok", default=1),
        groups=groups,
        top_groups=(size_of(config, "topk_group", default=1) or 1) if groups > 1 else 1,
        group_score=1 if groups > 1 else 0,
        scaling=number_of(config, "routed_scaling_factor", default=1.0),
    )


DEEPSEEK_V2 = Architecture(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    LATENT,
    _dimensions,
    LatentAttention(_rotary),
    mixture=MixtureOfExperts(_routing),
    for_transformers=with_number_of_shared_experts,
)
