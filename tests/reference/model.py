"""A small DeepSeek-V3 for training: multi-head latent attention, routed experts, one multi-token-prediction layer.

Parameters are float32 masters named as in the released checkpoints, except that the experts of a layer are stacked:
`mlp.experts.gate_up_proj` [E, 2I, D] (gate rows first) and `mlp.experts.down_proj` [E, D, I]. Products run in
`compute`, normally bfloat16; router scores, norms and the loss stay float32. Tokens are sorted by expert so that a layer
needs two grouped products; sorting is a permutation, so its gradient is a gather and never an atomic addition.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), sections 2.1 and 2.2.

Shape letters: B sequences, T positions, N = B*T tokens, D hidden, E experts, K experts per token, I expert width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class ModelConfig:
    """Sizes; the names are those of DeepSeek-V3's config.json."""

    vocab_size: int = 8192
    hidden_size: int = 256
    intermediate_size: int = 768
    moe_intermediate_size: int = 128
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    n_routed_experts: int = 32
    num_experts_per_tok: int = 4
    n_group: int = 4
    topk_group: int = 2
    routed_scaling_factor: float = 2.5
    q_lora_rank: int = 128
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6


class Linear(nn.Module):
    """A bias-free linear map; float32 weight, product in the dtype of the input."""

    def __init__(self, inputs: int, outputs: int, *, zero: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.zeros(outputs, inputs) if zero else torch.randn(outputs, inputs) * inputs**-0.5
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Root-mean-square norm computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs; the result holds first all even, then all odd members."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)


class Attention(nn.Module):
    """Multi-head latent attention (section 2.1.1), causal over the whole window."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config
        self.heads, self.nope, self.rope, self.value = (
            c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim)  # fmt: skip
        self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank)
        self.q_a_layernorm = RMSNorm(c.q_lora_rank, 1e-6)
        self.q_b_proj = Linear(c.q_lora_rank, self.heads * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.kv_lora_rank + self.rope)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, 1e-6)
        self.kv_b_proj = Linear(c.kv_lora_rank, self.heads * (self.nope + self.value))
        self.o_proj = Linear(self.heads * self.value, c.hidden_size, zero=True)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x_BTD.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD))).view(b, t, self.heads, -1).transpose(1, 2)
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x_BTD).split([self.kv_a_layernorm.weight.shape[0], self.rope], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(b, t, self.heads, -1).transpose(1, 2)
        k_nope, v = kv.split([self.nope, self.value], dim=-1)
        k_rope = rotate(k_rope.unsqueeze(1), cos, sin).expand(-1, self.heads, -1, -1)
        query = torch.cat([q_nope, rotate(q_rope, cos, sin)], dim=-1)
        key = torch.cat([k_nope, k_rope], dim=-1)
        # The fused attention kernels require values as wide as keys.
        v = functional.pad(v, (0, self.nope + self.rope - self.value))
        out = functional.scaled_dot_product_attention(query, key, v, is_causal=True)[..., : self.value]
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    """Gated linear unit with SiLU."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, width)
        self.up_proj = Linear(hidden, width)
        self.down_proj = Linear(width, hidden, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Sigmoid scores, group-limited top-k on biased scores, weights from unbiased ones (section 2.1.2)."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.randn(config.n_routed_experts, config.hidden_size) * 0.02)
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        scores = functional.linear(x_ND.float(), self.weight.float()).sigmoid()
        biased = (scores + self.e_score_correction_bias).detach()
        grouped = biased.view(-1, c.n_group, c.n_routed_experts // c.n_group)
        best_groups = grouped.topk(2, dim=-1)[0].sum(-1).topk(c.topk_group, dim=-1)[1]
        allowed = torch.zeros_like(grouped[..., 0]).scatter(1, best_groups, 1.0).bool()
        biased = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)
        experts_NK = biased.topk(c.num_experts_per_tok, dim=-1)[1]
        weights_NK = scores.gather(1, experts_NK)
        weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor
        return experts_NK, weights_NK


class Spread(torch.autograd.Function):
    """Copy token n to the positions of its K experts in the sorted order; the gradient gathers and sums them."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return x_ND[order // top_k]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        gathered = grads[0][inverse]
        return gathered.view(-1, ctx.top_k, gathered.shape[-1]).sum(1), None, None, None


class Permute(torch.autograd.Function):
    """Rows in the order `inverse`, whose own inverse is `order`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x[inverse]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return grads[0][order], None, None


def grouped_product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows of x, sorted by group, times the transposed matrix of their group."""
    if x.is_cuda:
        return functional.grouped_mm(x, weight.transpose(-2, -1), offs=offsets)
    ends = offsets.tolist()
    return torch.cat([x[a:b] @ w.T for a, b, w in zip([0, *ends], ends, weight, strict=False)])


class Experts(nn.Module):
    """The routed experts of one layer, stacked."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, d, i = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.randn(e, 2 * i, d) * d**-0.5)
        self.down_proj = nn.Parameter(torch.zeros(e, d, i))

    def forward(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
        n, top_k = experts_NK.shape
        sorted_experts, order = experts_NK.reshape(-1).sort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(n * top_k, device=order.device))
        bounds = torch.arange(1, self.gate_up_proj.shape[0] + 1, device=order.device)
        offsets = torch.searchsorted(sorted_experts, bounds).to(torch.int32)
        spread = Spread.apply(x_ND, order, inverse, top_k)
        gate, up = grouped_product(spread, self.gate_up_proj.to(x_ND.dtype), offsets).chunk(2, dim=-1)
        out = grouped_product(functional.silu(gate) * up, self.down_proj.to(x_ND.dtype), offsets)
        out = Permute.apply(out, order, inverse).view(n, top_k, -1)
        mixed = (out * weights_NK.unsqueeze(-1)).sum(1).to(x_ND.dtype)
        load = torch.diff(offsets, prepend=offsets.new_zeros(1))
        return mixed, load


class MoE(nn.Module):
    """Routed experts plus one shared expert."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        x_ND = x_BTD.flatten(0, 1)
        mixed, load = self.experts(x_ND, *self.gate(x_ND))
        return mixed.view_as(x_BTD) + self.shared_experts(x_BTD), load


class DecoderLayer(nn.Module):
    """Attention and feed-forward with pre-norm residuals; the load of a dense layer is None."""

    def __init__(self, config: ModelConfig, *, dense: bool) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp: nn.Module = MLP(config.hidden_size, config.intermediate_size) if dense else MoE(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | None]:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos, sin)
        inner = self.mlp(self.post_attention_layernorm(x_BTD))
        out, load = inner if isinstance(inner, tuple) else (inner, None)
        return x_BTD + out, load


class MTPLayer(DecoderLayer):
    """Predicts the token after next from a hidden state and the next token's embedding (section 2.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, dense=False)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})


class Model(nn.Module):
    """The language model; `model.layers` holds the decoder layers and, last, the MTP layer."""

    def __init__(self, config: ModelConfig, compute: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config, self.compute = config, compute
        layers: list[nn.Module] = [DecoderLayer(config, dense=i == 0) for i in range(config.num_hidden_layers)]
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList([*layers, MTPLayer(config)]),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })  # fmt: skip
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        nn.init.normal_(self.model["embed_tokens"].weight, std=0.1)
        nn.init.normal_(self.lm_head.weight, std=0.01)

    def rotary(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, rope/2]."""
        rope = self.config.qk_rope_head_dim
        frequencies = self.config.rope_theta ** (-torch.arange(0, rope, 2, device=device).float() / rope)
        angles = torch.arange(length, device=device).float()[:, None] * frequencies
        return angles.cos().to(self.compute), angles.sin().to(self.compute)

    def trunk(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Final hidden states after the last norm, and the loads [layers, E] of the MoE layers."""
        cos, sin = self.rotary(tokens_BT.shape[1], tokens_BT.device)
        x_BTD = self.model["embed_tokens"](tokens_BT).to(self.compute)
        loads = []
        for layer in list(self.model["layers"])[:-1]:
            x_BTD, load = layer(x_BTD, cos, sin)
            if load is not None:
                loads.append(load)
        return self.model["norm"](x_BTD), torch.stack(loads)

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy in nats, one per target."""
        return functional.cross_entropy(self.lm_head(hidden).flatten(0, 1).float(), targets.flatten(), reduction="none")

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean losses of the next token and of the one after, and all loads, on windows of T+2 tokens."""
        hidden, loads = self.trunk(tokens[:, :-2])
        main = self.token_losses(hidden, tokens[:, 1:-1]).mean()
        mtp = self.model["layers"][-1]
        cos, sin = self.rotary(hidden.shape[1], hidden.device)
        following = self.model["embed_tokens"](tokens[:, 1:-1]).to(self.compute)
        joined = mtp.eh_proj(torch.cat([mtp.enorm(following), mtp.hnorm(hidden)], dim=-1))
        ahead, load = mtp(joined, cos, sin)
        second = self.token_losses(mtp.shared_head["norm"](ahead), tokens[:, 2:]).mean()
        return main, second, torch.cat([loads, load[None]])
