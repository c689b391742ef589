"""DeepSeek-V3 and R1: sigmoid routers with a correction bias, and multi-token-prediction layers (arXiv 2412.19437)."""

from quantlab.architectures.architecture import Architecture, Dimensions
from quantlab.architectures.config import Config, number_of, size_of
from quantlab.architectures.layer import LatentAttention, MixtureOfExperts, RotaryLayout, Routing
from quantlab.architectures.rules import LATENT, MTP, latent_dimensions, with_number_of_shared_experts


def _dimensions(config: Config) -> Dimensions:
    return latent_dimensions(config, bias_corrected=config.get("topk_method", "noaux_tc") == "noaux_tc")


def _rotary(config: Config) -> RotaryLayout:
    return RotaryLayout(projected=bool(config.get("rope_interleave", True)), cached=False)


def _routing(config: Config) -> Routing:
    """The score of a group is the sum of its two best experts' scores."""
    groups = size_of(config, "n_group", default=1) or 1
    return Routing(
        experts=size_of(config, "n_routed_experts", default=0),
        top_k=size_of(config, "num_experts_per_tok", default=1),
        groups=groups,
        top_groups=(size_of(config, "topk_group", default=1) or 1) if groups > 1 else 1,
        group_score=2 if groups > 1 else 0,
        scoring="sigmoid",
        corrected=True,
        normalised=bool(config.get("norm_topk_prob", True)),
        scaling=number_of(config, "routed_scaling_factor", default=2.5),
    )


DEEPSEEK_V3 = Architecture(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    LATENT + MTP,
    _dimensions,
    LatentAttention(_rotary),
    mixture=MixtureOfExperts(_routing),
    mtp=True,
    for_transformers=with_number_of_shared_experts,
)
