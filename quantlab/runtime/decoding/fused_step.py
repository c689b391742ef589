"""A fused decode step: one new token per sequence, computed in few operations.

transformers' code runs about thirty small operations per layer besides the matrix products. For a few tokens, each of
them takes as long as reading a small matrix: on a GPU because of the kernel launch, on the CPU because of Python, which
takes a millisecond per layer.

On CUDA a fused step runs a dense layer in seven kernel launches (nine with norms of heads) and a layer with experts in
seventeen (sixteen for one token), on the same modules and the same cache. One product computes all linears that read
the same input; one launch rotates queries and keys, writes the cache and attends; one launch computes the router; the
last product of each half of a layer adds to the residual stream. Launches of this package's kernels overlap
(`quantlab.runtime.cuda.kernels`). On the CPU a layer is a dozen calls of native kernels. The first step records these
calls and later steps replay them (`quantlab.runtime.native.record`), unless the calls depend on the tokens, as those of
experts do for several tokens.

A fused step computes the same function as transformers' forward methods, with fewer roundings in between. It exists
only for models whose every part is recognized (`quantlab.runtime.decoding.fusable_parts`).

Legend: B sequences, H hidden width, V vocabulary size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from quantlab.architectures.layer import MixtureOfExperts
from quantlab.runtime.banks.expanded import ExpandedMatrices
from quantlab.runtime.cuda.banks import CudaMatrices
from quantlab.runtime.cuda.experts import routed
from quantlab.runtime.decoding.fusable_parts import ExpertParts, GroupedParts, LatentParts, LayerParts, ModelParts
from quantlab.runtime.decoding.kernel_interface import CachePosition, Kernels, Latents, RowNorm
from quantlab.runtime.modules.experts import Experts
from quantlab.runtime.modules.linear import FEW_ROWS, GatedMLP, Norm, PackedLinear, StackedLinearPart, is_silu
from quantlab.runtime.native.record import CannotRepeatError, Recorded

ResidualUpdate = Callable[[Tensor, Tensor], Tensor]
"""(x [B, ·], residual stream [B, H]) -> the residual stream plus a function of x."""
Attention = Callable[[Tensor, Tensor, CachePosition], Tensor]
"""The same function, with the position of the new tokens in the cache."""


@dataclass(frozen=True)
class _Layer:
    before: Norm
    attention: Attention
    between: Norm
    mlp: ResidualUpdate


class FusedStep:
    """The fused decode step of a model with a cache of fixed size.

    The step reads weights from the model's modules but does not call every module: hooks on modules may not fire, and
    modules or weights that are replaced later may not take effect.

    Args:
        model: the model that `parts` belong to.
        parts: result of `parts_of(model)`.
        cache: contains the prompts.
        position: [1] int64, index in the cache of the next tokens.
        padding: [B, 1] int64, number of empty positions in the cache before each prompt.
    """

    def __init__(
        self, model: PreTrainedModel, parts: ModelParts, cache: StaticCache, position: Tensor, padding: Tensor
    ) -> None:
        self._parts, self._position, self._padding = parts, position, padding
        self._on_cuda = position.device.type == "cuda"
        kernels = _kernels(position.device)
        self._layers = [
            _layer(layer, cache_layer, kernels) for layer, cache_layer in zip(parts.layers, cache.layers, strict=True)
        ]
        heads = int(model.config.num_attention_heads) if self._on_cuda else 0
        self._arrived = torch.zeros(padding.shape[0] * heads, dtype=torch.int32, device=position.device)
        self._cos, self._sin = _angles(parts.rotary, cache.layers[0].keys)
        self._recordable = not self._on_cuda and _is_recordable(model, padding.shape[0])
        self._recorded: tuple[Tensor, Recorded] | None = None
        weights = (*model.parameters(), *model.buffers()) if self._recordable else ()
        self._weights = [weight.detach() for weight in weights]  # recorded calls hold addresses only

    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens [B, 1] at `position` -> logits [B, V] of the next tokens, without waiting for the device."""
        hidden = self._parts.embeddings(tokens.flatten())
        if not self._recordable:
            return self._logits(hidden)
        if self._recorded is None:
            try:
                self._recorded = hidden, Recorded(lambda: self._logits(hidden))
            except CannotRepeatError:
                self._recordable = False
                return self._logits(hidden)
            return self._recorded[1].result.clone()
        read, recorded = self._recorded
        read.copy_(hidden)
        return recorded.run().clone()

    def _logits(self, hidden: Tensor) -> Tensor:
        cos, sin = self._cos, self._sin
        if self._on_cuda:
            text_position = (self._position - self._padding).flatten()
            cos, sin = cos.index_select(0, text_position), sin.index_select(0, text_position)
        cache_position = CachePosition(cos, sin, self._position, self._padding, self._arrived)
        for layer in self._layers:
            hidden = layer.attention(layer.before(hidden), hidden, cache_position)
            hidden = layer.mlp(layer.between(hidden), hidden)
        logits: Tensor = self._parts.head(self._parts.norm(hidden))
        return logits


def _kernels(device: torch.device) -> Kernels:
    if device.type == "cuda":
        from quantlab.runtime.cuda import launch_step

        return launch_step
    from quantlab.runtime.native import step

    return step


def _is_recordable(model: PreTrainedModel, batch: int) -> bool:
    """Whether every step makes the same kernel calls and a recording keeps no large tensors alive.

    With several tokens, the routing decides which kernels are called. A recording would also keep expanded matrices:
    those of formats without a kernel, and those of all formats for many rows.
    """
    parts = [type(module) for module in model.modules()]
    return batch <= (1 if Experts in parts else FEW_ROWS) and ExpandedMatrices not in parts


def _angles(rotary: nn.Module, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [S, n] float32 of the angles of n rotary pairs at each position of a cache [·, ·, S, ·].

    They are rounded to the dtype of the cache, as transformers rounds them.
    """
    like = torch.empty(1, 1, 1, dtype=keys.dtype, device=keys.device)
    found = rotary(like, position_ids=torch.arange(keys.shape[2], device=keys.device)[None])
    if isinstance(found, Tensor):  # complex
        cos, sin = torch.view_as_real(found[0]).unbind(-1)
    else:  # the angles twice
        cos, sin = (both[0, :, : both.shape[2] // 2] for both in found)
    return cos.float().contiguous(), sin.float().contiguous()


def _layer(parts: LayerParts, cache_layer: StaticLayer, kernels: Kernels) -> _Layer:
    attention = (
        _grouped_attention(parts.attention, cache_layer, kernels)
        if isinstance(parts.attention, GroupedParts)
        else _latent_attention(parts.attention, cache_layer, kernels)
    )
    mlp = _experts(parts.mlp, kernels) if isinstance(parts.mlp, ExpertParts) else _residual_update(parts.mlp, kernels)
    return _Layer(parts.before, attention, parts.between, mlp)


def _residual_update(module: nn.Module, kernels: Kernels) -> ResidualUpdate:
    """A linear or MLP that adds its output to the residual stream, in its last product if the kernels support it."""
    if isinstance(module, PackedLinear) and isinstance(module.matrices, CudaMatrices) and module.bias is None:
        matrices = module.matrices
        return lambda x, hidden: matrices.product(x, added=hidden)
    if isinstance(module, GatedMLP) and isinstance(module.down, CudaMatrices) and is_silu(module.act_fn):
        gate_up, down = module.gate_up, module.down
        if isinstance(gate_up, CudaMatrices):
            return lambda x, hidden: down.product(gate_up.product(x, gated=True), added=hidden)
    return lambda x, hidden: kernels.add(module(x), hidden)


def _outputs_of_same_input(linears: Sequence[nn.Module]) -> Callable[[Tensor], Sequence[Tensor]]:
    """Outputs of linears that read the same input, from one product if they are stacked."""
    first = linears[0]
    if isinstance(first, StackedLinearPart):
        return first.stack
    return lambda x: [linear(x) for linear in linears]


def _grouped_attention(parts: GroupedParts, cache_layer: StaticLayer, kernels: Kernels) -> Attention:
    project = _outputs_of_same_input([parts.query, parts.key, parts.value])
    add_output = _residual_update(parts.output, kernels)
    norms = None if parts.head_norms is None else [_row_norm(norm) for norm in parts.head_norms]

    def attention(x: Tensor, hidden: Tensor, cache_position: CachePosition) -> Tensor:
        q, k, v = project(x)
        if norms is not None:
            q, k = (kernels.norm_heads(heads, norm) for heads, norm in zip((q, k), norms, strict=True))
        return add_output(
            kernels.attend(q, k, v, cache_position, cache_layer.keys, cache_layer.values, parts.scaling), hidden
        )

    return attention


def _latent_attention(parts: LatentParts, cache_layer: StaticLayer, kernels: Kernels) -> Attention:
    project = _outputs_of_same_input([parts.query, parts.latent])
    add_output = _residual_update(parts.output, kernels)
    norm, q_up = _row_norm(parts.latent_norm), parts.query_up
    q_norm = None if parts.query_norm is None else _row_norm(parts.query_norm)
    cache = Latents(cache_layer.keys, cache_layer.values, parts.rotary)

    def attention(x: Tensor, hidden: Tensor, cache_position: CachePosition) -> Tensor:
        q, kv = project(x)
        if q_up is None:
            kernels.write_latents(kv, norm, cache_position, cache)
        else:
            q = q_up(kernels.write_latents(kv, norm, cache_position, cache, q, q_norm))
        q = q.view(q.shape[0], len(parts.up), -1)
        return add_output(kernels.attend_absorbed(q, parts.up, cache_position, cache, parts.scaling), hidden)

    return attention


def _row_norm(norm: Norm) -> RowNorm:
    return RowNorm(norm.weight, norm.variance_epsilon)


def _experts(parts: ExpertParts, kernels: Kernels) -> ResidualUpdate:
    experts, add_shared = parts.experts, _residual_update(parts.shared, kernels)
    choose = kernels.router(parts.weight, parts.bias, parts.routing)
    if not parts.weight.is_cuda:
        return lambda x, hidden: add_shared(x, kernels.add(experts(x, *choose(x)), hidden))
    from quantlab.runtime.cuda.launch_step import MOST_TOKENS

    def mlp(x: Tensor, hidden: Tensor) -> Tensor:
        if x.shape[0] <= MOST_TOKENS:
            index, weights = choose(x)
        else:
            outputs = dict(zip(MixtureOfExperts.ROUTED, parts.router(x), strict=True))
            index, weights = outputs["index"], outputs["weights"]
        return add_shared(x, routed(experts.gate_up, experts.down, x, index, weights, hidden))

    return mlp
