"""One decoder layer at a time: transformers' own modules, with memory only for the layer at work.

The model is built once on the meta device, where a tensor has a shape and no memory. A layer of it is copied, given memory
and handed out with its weights under the names they have in the checkpoint; routed experts, which transformers keeps in
two fused tensors, appear as views into those, one matrix per expert. Setting a weight is ``weights[name].copy_(…)``.

A layer of every family here is two halves that add to the hidden states x,

    x  <-  x + self_attn(input_layernorm(x))        x  <-  x + mlp(post_attention_layernorm(x))

and calibration goes through it half by half: once the attention's weights are settled its output is too, and what is
still to be learnt about the mlp does not have to pass through the attention again.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from quantlab.architectures.families import detect
from quantlab.calibration.experts import RoutedExperts
from quantlab.errors import CheckpointError

Positions = Any
"""What a rotary embedding makes for positions 0..L-1; its form is the family's own."""

_ATTENTION_NAME: Final = "quantlab_calibration"
_STAGES: Final = {
    "attention": (("attention",), ("q_latent", "kv_latent"), ("o",)),
    "mlp": (("mlp",), ("down",)),
}
EMBEDDINGS: Final = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Site:
    """A place where activations enter linear layers.

    Attributes:
        module: one of the layers that read them.
        width: K.
        weights: the names of the weights [N, K] of all of them; those of routed experts are not among them.
    """

    module: nn.Module
    width: int
    weights: tuple[str, ...]


@dataclass(frozen=True)
class Half:
    """The attention or the mlp of a layer, with the norm before it and the sum after it.

    Attributes:
        block: the name of the block, for example "layer 3".
        norm: [B, L, H] -> [B, L, H].
        body: the normalised hidden states -> what is added to the hidden states.
        sites: every input site of its linears by name; those of routed experts are not among them.
        stages: the names of the sites in the order in which activations reach them; sites of one stage do not depend on
            each other's linears.
        experts: the routed experts, None where there are none.
    """

    block: str
    norm: nn.Module
    body: Callable[[Tensor], Tensor]
    sites: Mapping[str, Site]
    stages: tuple[tuple[str, ...], ...]
    experts: RoutedExperts | None

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, L, H] after this half, in their dtype."""
        with torch.no_grad():
            return hidden + self.body(self.norm(hidden))

    @property
    def last(self) -> str | None:
        """The site whose one linear ends the half, None where routed experts add to what it says."""
        return None if self.experts is not None else self.stages[-1][-1]

    def finish(self, hidden: Tensor, last: Tensor) -> Tensor:
        """As `forward`, if what enters the last site [B, L, K] is known."""
        assert self.last is not None
        with torch.no_grad():
            output: Tensor = self.sites[self.last].module(last)
            return hidden + output


@dataclass(frozen=True)
class Layer:
    """A decoder layer with memory of its own, undefined until every weight has been set.

    Attributes:
        block: the name of the block, for example "layer 3".
        weights: the layer's tensors by their names in the checkpoint, views to be written to: linears [N, K] in the dtype
            of the computation, the router's `e_score_correction_bias` in float32.
        attention, mlp: its halves.
    """

    block: str
    weights: Mapping[str, Tensor]
    attention: Half
    mlp: Half

    @property
    def halves(self) -> tuple[Half, Half]:
        """In the order of the computation."""
        return self.attention, self.mlp

    def fill(self, read: Callable[[str], Tensor]) -> None:
        """Set every weight to what `read` returns for its name, of any floating dtype and device."""
        for name, weight in self.weights.items():
            weight.copy_(read(name))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, L, H] after this layer: causal attention, positions 0..L-1."""
        return self.mlp.forward(self.attention.forward(hidden))


class Skeleton:
    """A model without weights, from which layers are made.

    Args:
        config: config.json as it stands.
        dtype: of the computation.
        device: of the layers.
    """

    def __init__(self, config: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device) -> None:
        self.architecture = detect(config)
        plain = {key: copy.deepcopy(value) for key, value in config.items() if key != "quantization_config"}
        self.config: PreTrainedConfig = CONFIG_MAPPING[self.architecture.name].from_dict(plain)
        self.dtype, self.device = dtype, device
        AttentionInterface.register(_ATTENTION_NAME, _causal_attention)
        AttentionMaskInterface.register(_ATTENTION_NAME, sdpa_mask)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, dtype=dtype, attn_implementation=_ATTENTION_NAME)
        self._layers = model.model.layers
        # made on the real device: frequencies are computed from the config, in float32 whatever the dtype
        self._rotary = type(model.model.rotary_emb)(config=model.config).to(device)
        self._positions: dict[int, Positions] = {}

    @property
    def layers(self) -> int:
        """How many decoder layers there are, those for multi-token prediction not counted."""
        return len(self._layers)

    @property
    def width(self) -> int:
        """Width H of the hidden states."""
        return int(self.config.hidden_size)

    def embed(self, tokens: Tensor, embeddings: Tensor) -> Tensor:
        """The hidden states before the first layer.

        Args:
            tokens: [B, L] int64.
            embeddings: [V, H], on any device.

        Returns:
            [B, L, H] in the dtype and on the device of the layers.
        """
        return nn.functional.embedding(tokens.to(embeddings.device), embeddings).to(self.device, self.dtype)

    def layer(self, index: int) -> Layer:
        """Give the memory of layer `index` and hand it out, its weights undefined."""
        module = copy.deepcopy(self._layers[index])
        experts = _take_experts(module, dtype=self.dtype)
        module.to_empty(device=self.device).eval().requires_grad_(False)
        for owner in module.modules():
            for name, buffer in list(owner.named_buffers(recurse=False)):
                owner.register_buffer(name, buffer.float())  # the correction bias decides ties that float16 cannot
        weights = _named_weights(module, f"model.layers.{index}.", experts)
        block = f"layer {index}"
        sites = self._sites(module, index, weights)

        def attend(x: Tensor) -> Tensor:
            positions = self._positions_of(x, module.self_attn)
            output: Tensor = module.self_attn(hidden_states=x, position_embeddings=positions, attention_mask=None)[0]
            return output

        attention = _half(block, module.input_layernorm, attend, sites, "attention")
        mlp = _half(block, module.post_attention_layernorm, module.mlp, sites, "mlp", experts)
        return Layer(block, weights, attention, mlp)

    def _sites(self, module: nn.Module, index: int, weights: Mapping[str, Tensor]) -> dict[str, Site]:
        names: dict[str, list[str]] = {}
        for name in weights:
            claim = self.architecture.claim(name, hidden_layers=self.layers)
            if claim.rule is not None and claim.rule.site is not None and claim.expert is None:
                names.setdefault(claim.rule.site, []).append(name)
        prefix = f"model.layers.{index}."
        sites = {}
        for site, members in names.items():
            modules = [module.get_submodule(name.removeprefix(prefix).removesuffix(".weight")) for name in members]
            # a router is called in the family's own way, a linear layer always in the same
            watched = next((one for one in modules if isinstance(one, nn.Linear)), modules[0])
            sites[site] = Site(watched, weights[members[0]].shape[1], tuple(members))
        return sites

    def _positions_of(self, x: Tensor, attention: nn.Module) -> Positions:
        length = x.shape[1]
        window = getattr(attention, "sliding_window", None)
        if window is not None and length > window:
            raise CheckpointError(
                "calibration samples are longer than the model's sliding window",
                where="config.json, sliding_window",
                found=f"{length} tokens, a window of {window}",
                fix=f"set `length` of the calibration to at most {window}",
            )
        if length not in self._positions:
            self._positions[length] = self._rotary(x, torch.arange(length, device=x.device).unsqueeze(0))
        return self._positions[length]


def _half(
    block: str,
    norm: nn.Module,
    body: Callable[[Tensor], Tensor],
    sites: Mapping[str, Site],
    kind: str,
    experts: RoutedExperts | None = None,
) -> Half:
    stages = tuple(tuple(site for site in stage if site in sites) for stage in _STAGES[kind])
    own = {site: sites[site] for stage in stages for site in stage}
    return Half(block, norm, body, own, tuple(stage for stage in stages if stage), experts)


def _take_experts(module: nn.Module, *, dtype: torch.dtype) -> RoutedExperts | None:
    """Put our experts in the place of transformers', on the meta device; None where the layer is dense."""
    theirs = getattr(module.mlp, "experts", None)
    if theirs is None:
        return None
    experts, hidden, width = theirs.get_parameter("down_proj").shape
    with torch.device("meta"):
        ours = RoutedExperts(
            experts=experts, width=width, hidden=hidden, act_fn=theirs.get_submodule("act_fn"), dtype=dtype
        )
    module.get_submodule("mlp").experts = ours
    return ours


def _named_weights(module: nn.Module, prefix: str, experts: RoutedExperts | None) -> dict[str, Tensor]:
    """Every tensor of the layer under its name in the checkpoint."""
    weights: dict[str, Tensor] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not name.startswith("mlp.experts."):
            weights[prefix + name] = tensor.data
    for expert in range(0 if experts is None else len(experts.down_proj)):
        assert experts is not None
        for kind, view in (("gate", experts.gate(expert)), ("up", experts.up(expert)), ("down", experts.down(expert))):
            weights[f"{prefix}mlp.experts.{expert}.{kind}_proj.weight"] = view.data
    return weights


def _causal_attention(  # type: ignore[no-untyped-def]  # noqa: ANN202
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options,  # noqa: ANN003 - what transformers' attention modules pass on
):
    """transformers' attention call: query, key [B, A, L, D], value [B, A, L, V] -> [B, L, A, V] and no weights.

    The fused kernel for the CPU wants values as wide as queries; in latent attention they are narrower. Columns of zeros
    add nothing to the output but zeros, which are cut off again. Without them all L² scores of every head would exist.
    """
    width = value.shape[-1]
    if query.device.type == "cpu" and width < query.shape[-1]:
        value = nn.functional.pad(value, (0, query.shape[-1] - width))
    output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return output[..., :width], weights
