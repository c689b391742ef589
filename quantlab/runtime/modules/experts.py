"""The routed experts of a layer, with the call signature of transformers' experts module.

Each token is routed to `top_k` of E experts. Rows of activations are sorted by expert once, so that each expert in use
multiplies one contiguous slice, and the operations between the two matrix products run on all rows at once. A single
token needs no sorting, and a loop of small operations would take as long as reading the weights: each of its experts
reads the token as a view, and one product with the routing weights sums the results.
"""

from typing import Final

import torch
from torch import Tensor, nn

from quantlab.runtime.banks.choice import Matrices
from quantlab.runtime.banks.groups import RowGroups
from quantlab.runtime.cuda.experts import routed, takes
from quantlab.runtime.modules.linear import Activation, gated_mlp, is_silu
from quantlab.runtime.native import kernels
from quantlab.runtime.native.calls import IndexTensor
from quantlab.runtime.native.library import library

_ROWS_AT_ONCE: Final = 8192
"""Rows (tokens x experts per token) computed at once; bounds the size of the activations between the two products."""


class Experts(nn.Module):
    """All routed experts of a layer.

    Args:
        gate_up: bank of E matrices [2I, H], the gate's rows first.
        down: bank of E matrices [H, I].
        act_fn: the gate's activation function.
    """

    def __init__(self, gate_up: Matrices, down: Matrices, act_fn: Activation) -> None:
        super().__init__()
        self.gate_up, self.down, self.act_fn = gate_up, down, act_fn
        self.num_experts = gate_up.shape[0]

    def routes_on_device(self, dtype: torch.dtype) -> bool:
        """Whether CUDA kernels compute the whole module for activations of `dtype`.

        Otherwise the host reads the routing and therefore waits for the device.
        """
        return is_silu(self.act_fn) and takes(self.gate_up, self.down, dtype)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the outputs of each token's experts.

        Args:
            hidden_states: [tokens, H].
            top_k_index: [tokens, k] int64, the experts of each token.
            top_k_weights: [tokens, k], the weights of these experts.

        Returns:
            [tokens, H] in the dtype of `hidden_states`; summed in float32.
        """
        if hidden_states.is_cuda and self.routes_on_device(hidden_states.dtype):
            return routed(self.gate_up, self.down, hidden_states, top_k_index, top_k_weights)
        tokens, top_k = top_k_index.shape
        if tokens == 1:
            index = top_k_index[0]
            native = index.device.type == "cpu" and library() is not None
            matrices = IndexTensor(index) if native else index.tolist()
            groups = RowGroups(matrices, (1,) * top_k, index)
            rows = gated_mlp(hidden_states.expand(top_k, -1), groups, self.gate_up, self.down, self.act_fn)
            if rows.dtype != torch.float32 and rows.device.type == "cpu" and library() is not None:
                return kernels.weighted_sum(rows, top_k_weights.to(torch.float32))
            return torch.mm(top_k_weights.to(torch.float32), rows.to(torch.float32)).to(hidden_states.dtype)
        step = max(_ROWS_AT_ONCE // top_k, 1)
        if tokens <= step:
            return self._many(hidden_states, top_k_index, top_k_weights)
        parts = [slice(start, start + step) for start in range(0, tokens, step)]
        return torch.cat([self._many(hidden_states[part], top_k_index[part], top_k_weights[part]) for part in parts])

    def _many(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if not top_k_index.numel():
            return torch.zeros_like(hidden_states)
        top_k = top_k_index.shape[1]
        by_expert, order = top_k_index.flatten().sort(stable=True)
        counts = torch.bincount(by_expert, minlength=self.num_experts).tolist()
        hit = [(index, count) for index, count in enumerate(counts) if count]
        groups = RowGroups([index for index, _ in hit], [count for _, count in hit], by_expert)
        rows = hidden_states.index_select(0, order // top_k)
        outputs = gated_mlp(rows, groups, self.gate_up, self.down, self.act_fn)
        per_token = torch.empty_like(outputs).index_copy_(0, order, outputs).view(*top_k_index.shape, -1)
        weights = top_k_weights.to(torch.float32).unsqueeze(1)
        return torch.bmm(weights, per_token.to(torch.float32)).squeeze(1).to(hidden_states.dtype)
