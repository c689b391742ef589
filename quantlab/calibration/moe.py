"""Routed experts: the tokens routed to each expert, and the statistics of their inputs and outputs.

Each expert has its own input distribution: the tokens the router sends to it. Their inputs are not stored separately.
The input of an expert for a token is a row of the hidden states, which is normalised again whenever it is needed, so
only the routing takes memory: k indices and k weights per token. The hidden states must not advance while the inputs
are in use.

An expert that receives few tokens has a Hessian of low rank, which is shrunk towards a prior. Gate and up of all
experts have the same input space, so their prior is the mean over all tokens of the layer. The inputs of down are
neurons without counterpart in other experts, so their prior is the same expert evaluated on a sample of all tokens
(`sample`).
"""

from collections.abc import Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from quantlab.calibration.accumulate import Accumulator
from quantlab.calibration.collect import Stream, routing
from quantlab.calibration.experts import RoutedExperts, gated
from quantlab.calibration.hidden import HiddenStates
from quantlab.numerics.statistics import Need, SiteStatistics

_ROWS_AT_ONCE: Final = 1024
"""Tokens of one expert per batch on a CPU, so that their activations fit into its cache."""


@dataclass(frozen=True)
class _Reader:
    """Reads single inputs of the experts of one stream."""

    norm: nn.Module
    hidden: HiddenStates
    experts: RoutedExperts

    def inputs(self, rows: Tensor) -> Tensor:
        """Inputs [n, H] for the tokens `rows` [n]."""
        with torch.no_grad():
            normalised: Tensor = self.norm(self.hidden.rows(rows))
            return normalised


class MoeInputs:
    """The inputs of the routed experts of a layer; created by `collect_moe`.

    Args:
        changed: the stream of the model with the changes so far, entering the half layer with the experts.
        original: the same stream of the unchanged model; required for cross terms.
        index: [T, k] int64, the experts of each token.
        weights: [T, k] float32, their routing weights.
        layer: statistics over all tokens, the prior of every gate and up.

    Attributes:
        tokens_per_expert: tokens routed to each expert.
    """

    def __init__(
        self, changed: Stream, original: Stream | None, *, index: Tensor, weights: Tensor, layer: SiteStatistics
    ) -> None:
        self.block, self.layer = changed.half.block, layer
        self._changed = _reader(changed)
        self._original = None if original is None else _reader(original)
        self._device, self._step = changed.hidden.device, changed.hidden.tokens_at_once
        if self._device.type == "cpu":
            self._step = min(self._step, _ROWS_AT_ONCE)
        self._tokens, top_k = index.shape
        by_expert, order = index.flatten().sort(stable=True)
        counts = torch.bincount(by_expert, minlength=len(self._changed.experts.down_proj)).tolist()
        self.tokens_per_expert: tuple[int, ...] = tuple(counts)
        self._rows: tuple[Tensor, ...] = torch.split(order // top_k, counts)
        self._weights: tuple[Tensor, ...] = torch.split(weights.flatten().index_select(0, order), counts)

    def rows(self, expert: int) -> Tensor:
        """Indices of the tokens routed to the expert [n] int64, ascending, over all samples."""
        return self._rows[expert]

    def gate_weights(self, expert: int) -> Tensor:
        """The routing weight of each of these tokens [n] float32."""
        return self._weights[expert]

    def inputs(self, expert: int) -> Tensor:
        """The inputs of the expert [n, H]."""
        return self._changed.inputs(self.rows(expert))

    def sample(self, count: int) -> Tensor:
        """Indices [n] int64 of at most `count` evenly spaced tokens, regardless of their routing."""
        count = min(count, self._tokens)
        return torch.arange(count) * self._tokens // max(count, 1)

    def statistics(self, expert: int, needs: Collection[Need]) -> SiteStatistics:
        """Statistics of the inputs of the expert's gate and up, K = H.

        Raises:
            CheckpointError: an activation is NaN or infinite.
        """
        accumulator = Accumulator(self._changed.hidden.shape[2], needs, device=self._device)
        for rows in self._parts(self.rows(expert)):
            x = self._changed.inputs(rows)
            before = None if "cross" not in needs else self._before(rows)
            accumulator.update(x, before)
        return accumulator.result(where=f"{self.block}, expert {expert}, input site mlp")

    def down_statistics(
        self,
        expert: int,
        gate: Tensor,
        up: Tensor,
        needs: Collection[Need],
        *,
        rows: Tensor | None = None,
        unchanged_expert: int | None = None,
    ) -> SiteStatistics:
        """Statistics of the inputs of the expert's down projection, K = I.

        Args:
            expert: its number.
            gate, up: [I, H], as changed; the cross term compares with the unchanged expert on the unchanged inputs.
            needs: the statistics to compute.
            rows: its tokens [n] int64, by default those routed to it; for the prior those of `sample`.
            unchanged_expert: number of the same expert in the unchanged model, if experts before it were removed.

        Raises:
            CheckpointError: an activation is NaN or infinite.
        """
        act_fn = self._changed.experts.act_fn
        accumulator = Accumulator(gate.shape[0], needs, device=self._device)
        for part in self._parts(self.rows(expert) if rows is None else rows):
            with torch.no_grad():
                x = gated(self._changed.inputs(part), gate, up, act_fn)
                before = None
                if "cross" in needs:
                    assert self._original is not None, "the cross term compares with the unchanged model"
                    unchanged = self._original.experts
                    number = expert if unchanged_expert is None else unchanged_expert
                    before = gated(self._before(part), unchanged.gate(number), unchanged.up(number), act_fn)
            accumulator.update(x, before)
        return accumulator.result(where=f"{self.block}, expert {expert}, input site down")

    def gated_norm(self, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> float:
        """Sum of g · ‖f(x)‖₂ over the expert's tokens x, for its weights gate and up [I, H] and down [H, I].

        g is the routing weight as used by the layer, including scaling.
        """
        total = 0.0
        parts = zip(self._parts(self.rows(expert)), self._parts(self.gate_weights(expert)), strict=True)
        for rows, weights in parts:
            with torch.no_grad():
                inner = gated(self._changed.inputs(rows), gate, up, self._changed.experts.act_fn)
                norms = (inner @ down.T).to(torch.float32).norm(dim=1).double().cpu()
            total += (norms * weights).sum().item()
        return total

    def _parts(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Batches of tokens; empty if there are no tokens."""
        return tuple(torch.split(tokens, self._step)) if len(tokens) else ()

    def _before(self, rows: Tensor) -> Tensor:
        assert self._original is not None, "the cross term compares with the unchanged model"
        return self._original.inputs(rows)


def _reader(stream: Stream) -> _Reader:
    experts = stream.half.experts
    assert experts is not None, f"{stream.half.block} has no routed experts"
    # copy the norm: a pass may fold a scale into it while these inputs are in use
    return _Reader(deepcopy(stream.half.norm), stream.hidden, experts)


def collect_moe(changed: Stream, *, needs: Collection[Need] = (), original: Stream | None = None) -> MoeInputs:
    """Route every calibration token through the changed model's router.

    Args:
        changed: the stream of the model with the changes so far, entering the half layer with the experts.
        needs: the statistics to compute over all tokens of the layer.
        original: the same stream of the unchanged model; its tokens are routed by the changed model's router too.

    Raises:
        CheckpointError: an activation is NaN or infinite.
    """
    accumulator = Accumulator(changed.hidden.shape[2], needs, device=changed.hidden.device)
    before = _every_input(original) if original is not None and "cross" in needs else None
    index: list[Tensor] = []
    weights: list[Tensor] = []
    for x, experts, gates in routing(changed):
        accumulator.update(x, None if before is None else next(before))
        index.append(experts.cpu())
        weights.append(gates.to(torch.float32).cpu())
    layer = accumulator.result(where=f"{changed.half.block}, input site mlp")
    return MoeInputs(changed, original, index=torch.cat(index), weights=torch.cat(weights), layer=layer)


def _every_input(stream: Stream) -> Iterator[Tensor]:
    for _, hidden in stream.hidden.batches():
        with torch.no_grad():
            normalised: Tensor = stream.half.norm(hidden)
            yield normalised.flatten(0, 1)
