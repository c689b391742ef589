"""One decoder layer at a time: transformers' own modules, with memory only for the layer at work.

The model is built once on the meta device, where a tensor has a shape and no memory. A layer of it is copied, given memory
and handed out with its weights under the names they have in the checkpoint; routed experts, which transformers keeps in
two fused tensors, appear as views into those, one matrix per expert. Setting a weight is ``weights[name].copy_(…)``.

A layer is two halves that add to the hidden states x, as its family declares (`quantlab.architectures.layer`),

    x  <-  x + self_attn(input_layernorm(x))        x  <-  x + mlp(post_attention_layernorm(x))

and calibration runs through it half by half: once the attention's weights are final, so is its output, and statistics of the
mlp's inputs do not need another pass through the attention.
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
"""What a rotary embedding makes for positions 0..L-1; its form is the family's own."""

_ATTENTION_NAME: Final = "quantlab_calibration"
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
        experts: the routed experts, None without.
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
        """The site of the one linear that ends the half, None where routed experts add to its output."""
        return None if self.experts is not None else self.stages[-1][-1]

    def finish(self, hidden: Tensor, last: Tensor) -> Tensor:
        """As `forward`, from the known input of the last site [B, L, K]."""
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
        self.config: PreTrainedConfig = CONFIG_MAPPING[self.architecture.name].from_dict(
            dict(self.architecture.for_transformers(plain))
        )
        self.dtype, self.device = dtype, device
        AttentionInterface.register(_ATTENTION_NAME, _causal_attention)
        AttentionMaskInterface.register(_ATTENTION_NAME, sdpa_mask)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, dtype=dtype, attn_implementation=_ATTENTION_NAME)
        self._layers = model.model.layers
        self._window = self.architecture.attention.window(self.config.to_dict())
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
        _check_halves(module, self.architecture)
        experts = _take_experts(module, self.architecture, dtype=self.dtype)
        module.to_empty(device=self.device).eval().requires_grad_(False)
        for owner in module.modules():
            for name, buffer in list(owner.named_buffers(recurse=False)):
                owner.register_buffer(name, buffer.float())  # the correction bias decides ties that float16 cannot
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
    """Refuse a layer with a module that is in neither half: calibration would leave it out of the computation.

    Raises:
        CheckpointError: there is one.
    """
    declared = {name for half in architecture.halves for name in (half.norm, half.module)}
    found = {name for name, _ in layer.named_children()}
    own = [name for name, _ in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))]
    if found != declared or own:
        raise CheckpointError(
            "a layer is not the two halves that its family declares",
            where=f"{architecture.class_name} of transformers, {type(layer).__name__}",
            found=", ".join(sorted({*found, *own})),
            fix=f"declared are {', '.join(sorted(declared))}; use the version of transformers that quantlab asks for",
        )


def _take_experts(layer: nn.Module, architecture: Architecture, *, dtype: torch.dtype) -> RoutedExperts | None:
    """Replace transformers' routed experts by ours, on the meta device; None where the layer is dense."""
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
    """Every tensor of the layer under its name in the checkpoint."""
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    ours = {id(tensor) for tensor in experts.parameters()} if experts is not None else set()
    weights = {f"model.layers.{index}.{name}": tensor.data for name, tensor in tensors if id(tensor) not in ours}
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
