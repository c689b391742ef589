"""Recognizes the parts of a model that a fused decode step computes with.

A fused step does not call the forward methods of a layer, so it would silently skip a parameter or submodule that it
does not recognize. Therefore every parameter, buffer and submodule must be taken by a name that the family declares,
and must have a type that the step computes. If any is left over, the model is not fused: transformers' forward methods
run, and the name of the part is the reason.

Legend: H hidden width, E experts, h heads, N width of a head's keys without the rotary part, V width of a head's
values, L latent width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantlab.architectures.architecture import Architecture
from quantlab.architectures.detect import of_model_type
from quantlab.architectures.layer import (
    GATED_MLP,
    GroupedAttention,
    LatentAttention,
    MixtureOfExperts,
    RotaryLayout,
    Routing,
)
from quantlab.runtime.modules.attention import LATENT_SDPA, passes_latents
from quantlab.runtime.modules.experts import Experts
from quantlab.runtime.modules.linear import (
    DenseLinear,
    GatedMLP,
    Norm,
    PackedLinear,
    ReorderedLinear,
    StackedLinearPart,
)
from quantlab.runtime.native.library import library, status

LENGTH_DEPENDENT: Final = frozenset({"dynamic", "longrope"})
"""Types of rotary embeddings whose angles depend on the sequence length."""
_LINEARS: Final = (DenseLinear, ReorderedLinear, PackedLinear, StackedLinearPart)


@dataclass(frozen=True)
class GroupedParts:
    """Parts of grouped-query attention.

    Attributes:
        query, key, value: the projections.
        output: the output projection.
        head_norms: norms of each head of the queries and of the keys; None if the family has none.
        scaling: factor of the attention scores.
    """

    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    head_norms: tuple[Norm, Norm] | None
    scaling: float


@dataclass(frozen=True)
class LatentParts:
    """Parts of multi-head latent attention.

    Attributes:
        query: projection to the queries, or to the query latent (q_a).
        query_norm, query_up: norm and up-projection (q_b) of the query latent; None if queries are not compressed.
        latent: projection to latents and rotary keys (kv_a).
        latent_norm: norm of the latents.
        up: weight of the projection from latents to keys and values (kv_b), [h, N + V, L].
        output: the output projection.
        rotary: the order of rotary pairs.
        scaling: factor of the attention scores.
    """

    query: nn.Module
    query_norm: Norm | None
    query_up: nn.Module | None
    latent: nn.Module
    latent_norm: Norm
    up: Tensor
    output: nn.Module
    rotary: RotaryLayout
    scaling: float


@dataclass(frozen=True)
class ExpertParts:
    """Parts of a mixture of experts.

    Attributes:
        experts: the routed experts.
        shared: the shared expert.
        router: transformers' router module.
        weight: weight of the router, [E, H].
        bias: correction that the router adds to its scores to choose experts, [E]; None if it has none.
        routing: how the router scores and chooses experts.
    """

    experts: Experts
    shared: nn.Module
    router: nn.Module
    weight: Tensor
    bias: Tensor | None
    routing: Routing


@dataclass(frozen=True)
class LayerParts:
    """Parts of a decoder layer: norm before attention, attention, norm before the MLP, MLP.

    An MLP without experts is one module, which the step calls.
    """

    before: Norm
    attention: GroupedParts | LatentParts
    between: Norm
    mlp: ExpertParts | nn.Module


@dataclass(frozen=True)
class ModelParts:
    """Parts of a model that a fused step computes completely."""

    embeddings: nn.Module
    layers: tuple[LayerParts, ...]
    norm: Norm
    rotary: nn.Module
    head: nn.Module


@dataclass(frozen=True)
class NotFused:
    """The reason why transformers' forward methods decode a model."""

    reason: str


class _NotFusable(Exception):  # noqa: N818 - never leaves this file
    """A part that fused steps do not compute."""


def parts_of(model: PreTrainedModel) -> ModelParts | NotFused:
    """The parts of a model for a `FusedStep`, or the reason why its steps cannot be fused.

    Fused steps require 16-bit activations, CUDA or a CPU with the native kernels, the attention implementation of this
    package, and a model whose every part is recognized.
    """
    architecture = of_model_type(model.config.model_type)
    if architecture is None or type(model).__name__ != architecture.class_name:
        return NotFused(f"fused steps do not support {type(model).__name__}")
    if model.device.type not in {"cpu", "cuda"} or (model.device.type == "cpu" and library() is None):
        return NotFused(f"no kernels for fused steps on {model.device.type}: {status()}")
    if model.dtype not in {torch.bfloat16, torch.float16}:
        return NotFused(f"fused steps compute in 16 bits, the model computes in {_dtype_name(model.dtype)}")
    if model.config._attn_implementation != LATENT_SDPA:
        return NotFused(f"fused steps do not support the attention implementation {model.config._attn_implementation}")
    if architecture.attention.window(model.config.to_dict()) is not None:
        return NotFused("fused steps do not support sliding-window attention")
    try:
        return _Reader(model, architecture).model()
    except _NotFusable as found:
        return NotFused(str(found))


class _Reader:
    """Takes the parts of one model from its modules."""

    def __init__(self, model: PreTrainedModel, architecture: Architecture) -> None:
        self._model, self._architecture = model, architecture
        self._config, self._dtype = model.config.to_dict(), model.dtype
        self._on_cuda = model.device.type == "cuda"

    def model(self) -> ModelParts:
        with _all_parts(self._model, "") as whole, _all_parts(whole.take("model"), "model") as model:
            rotary = model.take("rotary_emb")
            if getattr(rotary, "rope_type", None) in LENGTH_DEPENDENT:
                raise _NotFusable(f"rotary embeddings of type {rotary.rope_type} depend on the sequence length")
            layers = model.take("layers", nn.ModuleList)
            assert isinstance(layers, nn.ModuleList)
            return ModelParts(
                embeddings=model.take("embed_tokens", nn.Embedding),
                layers=tuple(self._layer(layer, f"model.layers.{index}") for index, layer in enumerate(layers)),
                norm=self._norm(model, "norm"),
                rotary=rotary,
                head=whole.take("lm_head", *_LINEARS),
            )

    def _layer(self, module: nn.Module, path: str) -> LayerParts:
        first, second = self._architecture.halves
        declared = self._architecture.attention
        with _all_parts(module, path) as layer:
            before, between = self._norm(layer, first.norm), self._norm(layer, second.norm)
            attention, where = layer.take(first.module), f"{path}.{first.module}"
            taken = (
                self._grouped(attention, where, declared)
                if isinstance(declared, GroupedAttention)
                else self._latent(attention, where, declared)
            )
            return LayerParts(before, taken, between, self._mlp(layer.take(second.module), f"{path}.{second.module}"))

    def _norm(self, parts: "_Parts", name: str) -> Norm:
        norm = parts.take(name, Norm)
        assert isinstance(norm, Norm)
        if norm.weight.dtype != self._dtype:
            raise _NotFusable(
                f"{parts.path(name)} is {_dtype_name(norm.weight.dtype)}, the model {_dtype_name(self._dtype)}"
            )
        return norm

    def _grouped(self, module: nn.Module, path: str, declared: GroupedAttention) -> GroupedParts:
        width = self._architecture.dimensions(self._config)["head"]
        if width % 2:
            raise _NotFusable(f"the head width {width} is odd, so heads cannot be rotated in pairs")
        with _all_parts(module, path) as parts:
            names = (declared.QUERY, declared.KEY, declared.VALUE, declared.OUTPUT)
            query, key, value, output = (parts.take(name, *_LINEARS) for name in names)
            heads = declared.head_norms
            norms = None if heads is None else (self._norm(parts, heads.query), self._norm(parts, heads.key))
            return GroupedParts(query, key, value, output, norms, float(module.scaling))  # type: ignore[arg-type]

    def _latent(self, module: nn.Module, path: str, declared: LatentAttention) -> LatentParts:
        if not passes_latents(module):
            raise _NotFusable(f"{path}.{declared.LATENT_UP} is not a dense matrix, which attention to latents requires")
        compressed = bool(declared.query_rank(self._config))
        with _all_parts(module, path) as parts:
            up = parts.take(declared.LATENT_UP, DenseLinear).get_parameter("weight")
            return LatentParts(
                query=parts.take(declared.QUERY_DOWN if compressed else declared.QUERY, *_LINEARS),
                query_norm=self._norm(parts, declared.QUERY_NORM) if compressed else None,
                query_up=parts.take(declared.QUERY_UP, *_LINEARS) if compressed else None,
                latent=parts.take(declared.LATENT_DOWN, *_LINEARS),
                latent_norm=self._norm(parts, declared.LATENT_NORM),
                up=up.view(int(self._config["num_attention_heads"]), -1, up.shape[1]),
                output=parts.take(declared.OUTPUT, *_LINEARS),
                rotary=declared.rotary(self._config),
                scaling=float(module.scaling),  # type: ignore[arg-type]
            )

    def _mlp(self, module: nn.Module, path: str) -> ExpertParts | nn.Module:
        declared = self._architecture.mixture
        if declared is not None and hasattr(module, declared.EXPERTS):
            return self._experts(module, path, declared)
        if type(module) is not GatedMLP:
            with _all_parts(module, path) as parts:
                for name in (GATED_MLP.gate, GATED_MLP.up, GATED_MLP.down):
                    parts.take(name, *_LINEARS)
                parts.take(GATED_MLP.activation)
        return module

    def _experts(self, module: nn.Module, path: str, declared: MixtureOfExperts) -> ExpertParts:
        routing = declared.routing(self._config)
        sigmoid = routing.scoring == "sigmoid"
        if sigmoid != routing.corrected or routing.group_score not in {0, 2 if sigmoid else 1}:
            raise _NotFusable(f"no router kernel computes the routing of {path}.{declared.ROUTER}")
        with _all_parts(module, path) as parts:
            experts, router = parts.take(declared.EXPERTS, Experts), parts.take(declared.ROUTER)
            assert isinstance(experts, Experts)
            if self._on_cuda and not experts.routes_on_device(self._dtype):
                raise _NotFusable(
                    f"no kernel routes the experts of {path} in their format, so the host must read the routing"
                )
            shared = self._mlp(parts.take(declared.SHARED), f"{path}.{declared.SHARED}")
            assert isinstance(shared, nn.Module)
            with _all_parts(router, f"{path}.{declared.ROUTER}") as router_parts:
                weight = router_parts.tensor("weight")
                bias = router_parts.tensor(declared.BIAS) if routing.corrected else None
            return ExpertParts(experts, shared, router, weight, bias, routing)


class _Parts:
    """The parameters, buffers and submodules of one module that have not been taken yet."""

    def __init__(self, module: nn.Module, path: str) -> None:
        self._module, self._path = module, path
        self._modules = dict(module.named_children())
        self._tensors = dict([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])

    def path(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def take(self, name: str, *types: type[nn.Module]) -> nn.Module:
        """Take a submodule, whose type must be one of `types`; any type if none is given."""
        found = self._modules.pop(name, None)
        if found is None:
            raise _NotFusable(f"fused steps require {self.path(name)}, which does not exist")
        if types and type(found) not in types:
            raise _NotFusable(f"fused steps do not compute {self.path(name)} ({type(found).__name__})")
        return found

    def tensor(self, name: str) -> Tensor:
        """Take a parameter or buffer."""
        if name not in self._tensors:
            raise _NotFusable(f"fused steps require {self.path(name)}, which does not exist")
        return self._tensors.pop(name)

    def left(self) -> str | None:
        """Name of a part that has not been taken; None if all have."""
        return next((self.path(name) for name in (*self._tensors, *self._modules)), None)


@contextmanager
def _all_parts(module: nn.Module, path: str) -> Iterator[_Parts]:
    """The parts of a module; the `with` block must take all of them."""
    parts = _Parts(module, path)
    yield parts
    if (left := parts.left()) is not None:
        raise _NotFusable(f"fused steps do not compute {left}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
