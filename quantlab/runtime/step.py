"""A step of one new token per sequence, in few operations.

transformers' code runs some thirty small operations in a layer beside the products. At a few tokens each costs as long as the
reading of a small matrix: on a GPU to launch and to run, on the CPU to find its way through Python, where a layer takes a
millisecond of that.

Here, on CUDA, a dense layer is seven launches on the same modules and the same cache, one with experts seventeen, sixteen for
one token: norms; the products that read one input as one; rotation, cache and attention together; the router at once; what goes
to the residual stream added by the product that makes it. Those of our own kernels overlap (`quantlab.runtime.cuda.kernels`).
On the CPU a layer is a dozen calls of native kernels, which are recorded in the first step and run again in the next
(`quantlab.runtime.native.record`) where they are the same for all tokens: not for experts of several.

What is computed is what transformers computes, with fewer roundings in between.

Legend: B sequences, H hidden width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from quantlab.runtime.attention import LATENT_SDPA, hands_latents_on
from quantlab.runtime.cuda.banks import CudaMatrices
from quantlab.runtime.cuda.experts import routed
from quantlab.runtime.experts import Experts
from quantlab.runtime.linear import FEW_ROWS, GatedMLP, Norm, PackedLinear, PartOfStack, is_silu
from quantlab.runtime.matrices import ExpandedMatrices
from quantlab.runtime.native.library import library
from quantlab.runtime.native.record import CannotRepeatError, Recorded
from quantlab.runtime.places import Choice, Kernels, Latents, Pairs, Place, RowNorm

Parts = Any
"""A module of transformers, for its parts."""
Into = Callable[[Tensor, Tensor], Tensor]
"""Reads [B, ·] and adds what it makes of it to [B, H]."""
Attention = Callable[[Tensor, Tensor, Place], Tensor]
"""The same, at a place in the cache."""
LENGTH_DEPENDENT: Final = frozenset({"dynamic", "longrope"})
"""Rotary embeddings whose angles depend on the length of the text."""


@dataclass(frozen=True)
class _Layer:
    before: Norm
    attention: Attention
    between: Norm
    mlp: Into


class FusedStep:
    """A step of a model from a fixed cache.

    It reads the weights of the model's modules and does not call all modules: hooks on them see nothing of it, and a module or a
    weight that is replaced later may not be used.

    Args:
        model: one that `fuses`.
        cache: holds the prompts.
        position: [1] int64, where the next tokens stand in the cache.
        padding: [B, 1] int64, how many places of the cache are empty before each prompt.
    """

    def __init__(self, model: PreTrainedModel, cache: StaticCache, position: Tensor, padding: Tensor) -> None:
        self._model, self._position, self._padding = model, position, padding
        self._on_cuda = position.device.type == "cuda"
        kernels = _kernels(position.device)
        self._layers = [
            _layer(layer, held, kernels) for layer, held in zip(model.model.layers, cache.layers, strict=True)
        ]
        heads = int(model.config.num_attention_heads) if self._on_cuda else 0
        self._arrived = torch.zeros(padding.shape[0] * heads, dtype=torch.int32, device=position.device)
        self._cos, self._sin = _angles(model, int(cache.layers[0].keys.shape[2]))
        self._records = not self._on_cuda and _repeats(model, padding.shape[0])
        self._recorded: tuple[Tensor, Recorded] | None = None
        weights = (*model.parameters(), *model.buffers()) if self._records else ()
        self._weights = [weight.detach() for weight in weights]  # recorded calls know addresses only

    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens [B, 1] at `position` -> logits [B, V] of those after; nothing waits for the device."""
        hidden = self._model.model.embed_tokens(tokens.flatten())
        if not self._records:
            return self._logits(hidden)
        if self._recorded is None:
            try:
                self._recorded = hidden, Recorded(lambda: self._logits(hidden))
            except CannotRepeatError:
                self._records = False
                return self._logits(hidden)
            return self._recorded[1].result.clone()
        read, recorded = self._recorded
        read.copy_(hidden)
        return recorded.run().clone()

    def _logits(self, hidden: Tensor) -> Tensor:
        cos, sin = self._cos, self._sin
        if self._on_cuda:
            at = (self._position - self._padding).flatten()
            cos, sin = cos.index_select(0, at), sin.index_select(0, at)
        place = Place(cos, sin, self._position, self._padding, self._arrived)
        for layer in self._layers:
            hidden = layer.attention(layer.before(hidden), hidden, place)
            hidden = layer.mlp(layer.between(hidden), hidden)
        logits: Tensor = self._model.lm_head(self._model.model.norm(hidden))
        return logits


def fuses(model: PreTrainedModel) -> bool:
    """Whether `FusedStep` takes the model: in 16 bits on CUDA, or on a CPU that runs the native kernels, with the attention of this
    package, its parts all known.
    """
    return (
        (model.device.type == "cuda" or (model.device.type == "cpu" and library() is not None))
        and model.dtype in {torch.bfloat16, torch.float16}
        and model.config._attn_implementation == LATENT_SDPA
        and isinstance(model.model.norm, Norm)
        and getattr(model.model.rotary_emb, "rope_type", None) not in LENGTH_DEPENDENT
        and all(_is_known(layer, model.dtype, on_cuda=model.device.type == "cuda") for layer in model.model.layers)
    )


def _is_known(layer: Parts, dtype: torch.dtype, *, on_cuda: bool) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    latent = hasattr(attention, "kv_a_layernorm")
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if latent:
        norms += [attention.kv_a_layernorm, *([attention.q_a_layernorm] if attention.q_lora_rank is not None else [])]
    experts = getattr(mlp, "experts", None)
    return (
        all(isinstance(norm, Norm) and norm.weight.dtype == dtype for norm in norms)
        and (hands_latents_on(attention) if latent else attention.head_dim % 2 == 0)
        and (experts is None or (isinstance(experts, Experts) and (not on_cuda or experts.routes_on_device(dtype))))
    )


def _kernels(device: torch.device) -> Kernels:
    if device.type == "cuda":
        from quantlab.runtime.cuda import launch_step

        return launch_step
    from quantlab.runtime.native import step

    return step


def _repeats(model: PreTrainedModel, batch: int) -> bool:
    """Whether the calls of a step are the same for all tokens, and leave nothing large behind.

    Which experts several tokens hit decides what is called. Expanded matrices would be kept: those of some schemes are always
    expanded, of the others many are at many rows.
    """
    parts = [type(module) for module in model.modules()]
    return batch <= (1 if Experts in parts else FEW_ROWS) and ExpandedMatrices not in parts


def _angles(model: PreTrainedModel, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin [S, n] float32 of the angles of n pairs at every place, rounded as transformers rounds them."""
    like = torch.empty(1, 1, 1, dtype=model.dtype, device=model.device)
    found = model.model.rotary_emb(like, position_ids=torch.arange(length, device=model.device)[None])
    if isinstance(found, Tensor):  # complex
        cos, sin = torch.view_as_real(found[0]).unbind(-1)
    else:  # the angles twice
        cos, sin = (both[0, :, : both.shape[2] // 2] for both in found)
    return cos.float().contiguous(), sin.float().contiguous()


def _layer(layer: Parts, held: StaticLayer, kernels: Kernels) -> _Layer:
    attention = layer.self_attn
    made = _latent_attention if hasattr(attention, "kv_a_layernorm") else _grouped_attention
    mlp = _experts(layer.mlp, kernels) if hasattr(layer.mlp, "experts") else _into(layer.mlp, kernels)
    return _Layer(layer.input_layernorm, made(attention, held, kernels), layer.post_attention_layernorm, mlp)


def _into(module: nn.Module, kernels: Kernels) -> Into:
    """A linear or MLP, added to what it is handed: by its last product, where the kernels do that."""
    if isinstance(module, PackedLinear) and isinstance(module.matrices, CudaMatrices) and module.bias is None:
        matrices = module.matrices
        return lambda x, hidden: matrices.product(x, added=hidden)
    if isinstance(module, GatedMLP) and isinstance(module.down, CudaMatrices) and is_silu(module.act_fn):
        gate_up, down = module.gate_up, module.down
        if isinstance(gate_up, CudaMatrices):
            return lambda x, hidden: down.product(gate_up.product(x, gated=True), added=hidden)
    return lambda x, hidden: kernels.add(module(x), hidden)


def _together(linears: Sequence[nn.Module]) -> Callable[[Tensor], Sequence[Tensor]]:
    """Linears that read the same input: one product where they are a stack."""
    first = linears[0]
    if isinstance(first, PartOfStack):
        return first.stack
    return lambda x: [linear(x) for linear in linears]


def _grouped_attention(module: Parts, held: StaticLayer, kernels: Kernels) -> Attention:
    project = _together([module.q_proj, module.k_proj, module.v_proj])
    add_output = _into(module.o_proj, kernels)
    scaling = float(module.scaling)

    def attention(x: Tensor, hidden: Tensor, place: Place) -> Tensor:
        q, k, v = project(x)
        return add_output(kernels.attend(q, k, v, place, held.keys, held.values, scaling), hidden)

    return attention


def _latent_attention(module: Parts, held: StaticLayer, kernels: Kernels) -> Attention:
    compressed = module.q_lora_rank is not None
    project = _together([module.q_a_proj if compressed else module.q_proj, module.kv_a_proj_with_mqa])
    add_output = _into(module.o_proj, kernels)
    heads = int(module.num_heads)
    weight = module.get_parameter("kv_b_proj.weight").view(heads, -1, module.kv_lora_rank)
    norm, scaling = _row_norm(module.kv_a_layernorm), float(module.scaling)
    q_norm = _row_norm(module.q_a_layernorm) if compressed else None
    cache = Latents(held.keys, held.values, _pairs(module))

    def attention(x: Tensor, hidden: Tensor, place: Place) -> Tensor:
        q, kv = project(x)
        if q_norm is None:
            kernels.keep_latents(kv, norm, place, cache)
        else:
            q = module.q_b_proj(kernels.keep_latents(kv, norm, place, cache, q, q_norm))
        q = q.view(q.shape[0], heads, -1)
        return add_output(kernels.attend_absorbed(q, weight, place, cache, scaling), hidden)

    return attention


def _row_norm(norm: Norm) -> RowNorm:
    return RowNorm(norm.weight, norm.variance_epsilon)


def _pairs(module: Parts) -> Pairs:
    """Where the rotary numbers of DeepSeek-V2 and V3 lie: see `apply_rotary_emb` and `apply_rotary_pos_emb_interleave`."""
    if module.config.model_type == "deepseek_v2":
        return Pairs(projected=True, cached=True)
    return Pairs(projected=bool(module.config.rope_interleave), cached=False)


def _experts(module: Parts, kernels: Kernels) -> Into:
    experts, add_shared, router = module.experts, _into(module.shared_experts, kernels), module.gate
    choose = kernels.router(router.weight, getattr(router, "e_score_correction_bias", None), _choice(router))
    if not router.weight.is_cuda:
        return lambda x, hidden: add_shared(x, kernels.add(experts(x, *choose(x)), hidden))
    from quantlab.runtime.cuda.launch_step import MOST_TOKENS

    def mlp(x: Tensor, hidden: Tensor) -> Tensor:
        if x.shape[0] <= MOST_TOKENS:
            index, weights = choose(x)
        else:
            _, weights, index = router(x)
        return add_shared(x, routed(experts.gate_up, experts.down, x, index, weights, hidden))

    return mlp


def _choice(router: Parts) -> Choice:
    third = hasattr(router, "e_score_correction_bias")
    grouped = third or router.topk_method == "group_limited_greedy"
    return Choice(
        groups=int(router.num_group) if grouped else 1,
        top_groups=int(router.topk_group) if grouped else 1,
        top_k=int(router.top_k),
        sigmoid=third,
        normed=third and bool(router.norm_topk_prob),
        scaling=float(router.routed_scaling_factor),
    )
