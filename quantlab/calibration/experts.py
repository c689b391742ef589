"""The routed experts of a layer for calibration: per-expert views of the weights, and a hook on the routing.

transformers calls ``experts(hidden_states, top_k_index, top_k_weights)`` in every mixture-of-experts family;
calibration records the routing in that call. Each token is routed to k of E experts. Rows are sorted by expert, so that
each expert multiplies one contiguous slice; outputs are summed per token in a fixed order, so that runs agree bit for
bit on every device.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]
Recorder = Callable[[Tensor, Tensor, Tensor], None]
"""Called with hidden_states [T, H], top_k_index [T, k] and top_k_weights [T, k] before the experts compute."""

_BYTES_AT_ONCE: Final = 1 << 28
"""Limit on the bytes of the experts' activations: per row [H] inputs, [3I] intermediates and [H] outputs."""


def gated(x: Tensor, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Inputs of an expert's down projection: activation(x gateᵀ) · (x upᵀ).

    Args:
        x: [n, H].
        gate, up: [I, H].
        activation: activation function of the gate.

    Returns:
        [n, I].
    """
    return activation(x @ gate.T).mul_(x @ up.T)


class RoutedExperts(nn.Module):
    """All routed experts of a layer, in transformers' fused layout.

    Args:
        experts: number of experts, E.
        width: intermediate width of an expert, I.
        hidden: hidden width, H.
        act_fn: activation function of the gate.
        dtype: dtype of the weights.

    Attributes:
        gate_up_proj: [E, 2I, H], the gate's rows first.
        down_proj: [E, H, I].
        recorder: called with the arguments of every forward call.
        skipped: whether to return zeros instead of computing, for forward passes that do not need the experts' outputs.
    """

    def __init__(self, *, experts: int, width: int, hidden: int, act_fn: Activation, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden, dtype=dtype), requires_grad=False)
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width, dtype=dtype), requires_grad=False)
        self.act_fn = act_fn
        self.recorder: Recorder | None = None
        self.skipped = False

    def gate(self, expert: int) -> Tensor:
        """[I, H], a view."""
        return self.gate_up_proj[expert, : self.down_proj.shape[2]]

    def up(self, expert: int) -> Tensor:
        """[I, H], a view."""
        return self.gate_up_proj[expert, self.down_proj.shape[2] :]

    def down(self, expert: int) -> Tensor:
        """[H, I], a view."""
        return self.down_proj[expert]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: [T, H].
            top_k_index: [T, k] int64.
            top_k_weights: [T, k].

        Returns:
            [T, H] in the dtype of `hidden_states`; summed in float32.
        """
        if self.recorder is not None:
            self.recorder(hidden_states, top_k_index, top_k_weights)
        if self.skipped:
            return torch.zeros_like(hidden_states)
        hidden, width = self.down_proj.shape[1:]
        row_bytes = top_k_index.shape[1] * (2 * hidden + 3 * width) * hidden_states.element_size()
        step = max(_BYTES_AT_ONCE // row_bytes, 1)
        parts = [slice(start, start + step) for start in range(0, len(hidden_states), step)]
        return torch.cat([self._some(hidden_states[part], top_k_index[part], top_k_weights[part]) for part in parts])

    def _some(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        tokens, top_k = top_k_index.shape
        by_expert, order = top_k_index.flatten().sort(stable=True)
        counts = torch.bincount(by_expert, minlength=len(self.down_proj)).tolist()
        rows = hidden_states.index_select(0, order // top_k)
        start = 0
        for expert, count in enumerate(counts):
            if count:
                part = rows[start : start + count]
                inner = gated(part, self.gate(expert), self.up(expert), self.act_fn)
                torch.mm(inner, self.down(expert).T, out=part)  # overwrites its input, which is no longer needed
                start += count
        position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        position, weights = position.view(tokens, top_k), top_k_weights.to(torch.float32)
        total = torch.zeros(tokens, hidden_states.shape[1], dtype=torch.float32, device=hidden_states.device)
        for slot in range(top_k):
            total.addcmul_(rows.index_select(0, position[:, slot]), weights[:, slot, None])
        return total.to(hidden_states.dtype)
