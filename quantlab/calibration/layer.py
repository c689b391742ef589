"""One decoder layer at a time: transformers' own modules, with memory for the current layer only.

The model is built once on the meta device, where tensors have a shape but no memory. To use a layer, its module is
copied and allocated; its weights are accessible by their names in the checkpoint. Routed experts, which transformers
stores in two fused tensors, appear as views, one matrix per expert. A weight is set by ``weights[name].copy_(…)``.

A layer is two halves that add to the hidden states x, as its family declares (`quantlab.architectures.layer`),

    x  <-  x + self_attn(input_layernorm(x))        x  <-  x + mlp(post_attention_layernorm(x))

and calibration processes the halves in order: once the attention's weights are final, so is its output, and statistics
of the mlp's inputs need no further pass through the attention.
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

from quantlab.architectures.architecture import Architecture
from quantlab.architectures.detect import detect
from quantlab.architectures.layer import GATED_MLP, Sublayer
from quantlab.calibration.experts import RoutedExperts
from quantlab.errors import CheckpointError

Positions = Any
"""Output of a rotary embedding for positions 0..L-1; its type depends on the family."""

_ATTENTION_NAME: Final = "quantlab_calibration"
EMBEDDINGS: Final = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Site:
    """An input site: activations that enter one or more linear layers.

    Attributes:
        module: one of the modules that read them.
        width: K.
        weights: names of the weights [N, K] of all readers, without those of routed experts.
    """

    module: nn.Module
    width: int
    weights: tuple[str, ...]


@dataclass(frozen=True)
class Half:
    """The attention or the mlp of a layer, with the norm before it and the residual addition after it.

    Attributes:
        block: name of the block, for example "layer 3".
        norm: [B, L, H] -> [B, L, H].
        body: maps the normalised hidden states to the update of the hidden states.
        sites: input sites of its linears by name, without those of routed experts.
        stages: names of the sites in the order of the forward pass; sites of one stage do not depend on each other's
            linears.
        experts: the routed experts, None if there are none.
    """

    block: str
    norm: nn.Module
    body: Callable[[Tensor], Tensor]
    sites: Mapping[str, Site]
    stages: tuple[tuple[str, ...], ...]
    experts: RoutedExperts | None

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, L, H] after this half, in their dtype."""
        return hidden + self.update(hidden)

    def update(self, hidden: Tensor) -> Tensor:
        """What this half adds to the hidden states [B, L, H]."""
        with torch.no_grad():
            return self.body(self.norm(hidden))

    @property
    def last(self) -> str | None:
        """The site of the linear that ends the half, None if routed experts contribute to its output."""
        return None if self.experts is not None else self.stages[-1][-1]

    def finish(self, hidden: Tensor, last: Tensor) -> Tensor:
        """As `forward`, computed from the given input of the last site [B, L, K]."""
        assert self.last is not None
        with torch.no_grad():
            output: Tensor = self.sites[self.last].module(last)
            return hidden + output


@dataclass(frozen=True)
class Layer:
    """An allocated decoder layer; its weights are undefined until they are set.

    Attributes:
        block: name of the block, for example "layer 3".
        weights: writable views of the layer's tensors by their names in the checkpoint: linears [N, K] in the dtype of
            the computation, the router's `e_score_correction_bias` in float32.
        attention, mlp: its halves.
    """

    block: str
    weights: Mapping[str, Tensor]
    attention: Half
    mlp: Half

    @property
    def halves(self) -> tuple[Half, Half]:
        """The halves in the order of the forward pass."""
        return self.attention, self.mlp

    def fill(self, read: Callable[[str], Tensor]) -> None:
        """Set every weight to the tensor that `read` returns for its name, of any floating dtype and device."""
        for name, weight in self.weights.items():
            weight.copy_(read(name))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, L, H] after this layer: causal attention, positions 0..L-1."""
        return self.mlp.forward(self.attention.forward(hidden))


class Skeleton:
    """A model on the meta device, from which layers are allocated.

    Args:
        config: contents of config.json.
        dtype: dtype of the computation.
        device: device of the layers.
    """

    def __init__(self, config: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device) -> None:
        self.architecture = detect(config)
        self.config: PreTrainedConfig = CONFIG_MAPPING[self.architecture.name].from_dict(
            self.architecture.model_fields(config)
        )
        self.dtype, self.device = dtype, device
        AttentionInterface.register(_ATTENTION_NAME, _causal_attention)
        AttentionMaskInterface.register(_ATTENTION_NAME, sdpa_mask)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, dtype=dtype, attn_implementation=_ATTENTION_NAME)
        self._layers = model.model.layers
        self._window = self.architecture.attention.window(self.config.to_dict())
        # created on the real device: frequencies are computed from the config, always in float32
        self._rotary = type(model.model.rotary_emb)(config=model.config).to(device)
        self._positions: dict[int, Positions] = {}

    @property
    def layers(self) -> int:
        """Number of decoder layers, without those for multi-token prediction."""
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
        """Allocate layer `index`; its weights are undefined."""
        module = copy.deepcopy(self._layers[index])
        _check_halves(module, self.architecture)
        experts = _take_experts(module, self.architecture, dtype=self.dtype)
        module.to_empty(device=self.device).eval().requires_grad_(False)
        for owner in module.modules():
            for name, buffer in list(owner.named_buffers(recurse=False)):
                owner.register_buffer(name, buffer.float())  # float16 cannot resolve differences of the correction bias
        weights = _named_weights(module, index, self.architecture, experts)
        block = f"layer {index}"
        sites = self._sites(module, index, weights)

        first, second = self.architecture.halves
        attention, mlp = (module.get_submodule(half.module) for half in (first, second))

        def attend(x: Tensor) -> Tensor:
            positions = self._positions_of(x)
            output: Tensor = attention(hidden_states=x, position_embeddings=positions, attention_mask=None)[0]
            return output

        return Layer(
            block,
            weights,
            attention=_half(block, module, first, attend, sites),
            mlp=_half(block, module, second, mlp, sites, experts),
        )

    def _sites(self, module: nn.Module, index: int, weights: Mapping[str, Tensor]) -> dict[str, Site]:
        names: dict[str, list[str]] = {}
        for name in weights:
            tensor = self.architecture.classify(name, hidden_layers=self.layers)
            if tensor.rule is not None and tensor.rule.site is not None and tensor.expert is None:
                names.setdefault(tensor.rule.site, []).append(name)
        prefix = f"model.layers.{index}."
        sites = {}
        for site, members in names.items():
            modules = [module.get_submodule(name.removeprefix(prefix).removesuffix(".weight")) for name in members]
            # hook a linear layer if there is one: the call of a router depends on the family
            watched = next((one for one in modules if isinstance(one, nn.Linear)), modules[0])
            sites[site] = Site(watched, weights[members[0]].shape[1], tuple(members))
        return sites

    def _positions_of(self, x: Tensor) -> Positions:
        length, window = x.shape[1], self._window
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
    layer: nn.Module,
    declared: Sublayer,
    body: Callable[[Tensor], Tensor],
    sites: Mapping[str, Site],
    experts: RoutedExperts | None = None,
) -> Half:
    stages = tuple(tuple(site for site in stage if site in sites) for stage in declared.stages)
    own = {site: sites[site] for stage in stages for site in stage}
    norm = layer.get_submodule(declared.norm)
    return Half(block, norm, body, own, tuple(stage for stage in stages if stage), experts)


def _check_halves(layer: nn.Module, architecture: Architecture) -> None:
    """Refuse a layer with a module outside its two halves: calibration would omit it.

    Raises:
        CheckpointError: there is such a module.
    """
    declared = {name for half in architecture.halves for name in (half.norm, half.module)}
    found = {name for name, _ in layer.named_children()}
    own = [name for name, _ in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))]
    if found != declared or own:
        raise CheckpointError(
            "a layer does not consist of the two halves that its family declares",
            where=f"{architecture.class_name} of transformers, {type(layer).__name__}",
            found=", ".join(sorted({*found, *own})),
            fix=f"declared are {', '.join(sorted(declared))}; use a version of transformers that quantlab requires",
        )


def _take_experts(layer: nn.Module, architecture: Architecture, *, dtype: torch.dtype) -> RoutedExperts | None:
    """Replace transformers' routed experts by `RoutedExperts`, on the meta device; None if the layer is dense."""
    if architecture.mixture is None:
        return None
    mlp, name = layer.get_submodule(architecture.halves[1].module), architecture.mixture.EXPERTS
    theirs = getattr(mlp, name, None)
    if theirs is None:
        return None
    experts, hidden, width = theirs.get_parameter(GATED_MLP.down).shape
    with torch.device("meta"):
        act_fn = theirs.get_submodule(GATED_MLP.activation)
        ours = RoutedExperts(experts=experts, width=width, hidden=hidden, act_fn=act_fn, dtype=dtype)
    setattr(mlp, name, ours)
    return ours


def _named_weights(
    layer: nn.Module, index: int, architecture: Architecture, experts: RoutedExperts | None
) -> dict[str, Tensor]:
    """The tensors of the layer by their names in the checkpoint."""
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    ours = {id(tensor) for tensor in experts.parameters()} if experts is not None else set()
    weights = {
        f"model.layers.{index}.{name}": tensor.data
        for name, tensor in tensors
        if id(tensor) not in ours and tensor.numel()  # zero shared experts have matrices without elements
    }
    for expert in range(len(experts.down_proj) if experts is not None else 0):
        assert experts is not None
        views = (experts.gate(expert), experts.up(expert), experts.down(expert))
        for name, view in zip(architecture.expert_names(index, expert), views, strict=True):
            weights[name] = view.data
    return weights


def _causal_attention(  # type: ignore[no-untyped-def]  # noqa: ANN202
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options,  # noqa: ANN003 - options of transformers' attention modules
):
    """transformers' attention call: query, key [B, A, L, D], value [B, A, L, V] -> [B, L, A, V], and None for the
    weights.

    The fused CPU kernel requires values as wide as queries; in latent attention they are narrower. They are padded with
    zeros, and the zero columns of the output are cut off. Otherwise all L² scores of every head would be materialised.
    """
    width = value.shape[-1]
    if query.device.type == "cpu" and width < query.shape[-1]:
        value = nn.functional.pad(value, (0, query.shape[-1] - width))
    output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return output[..., :width], weights
