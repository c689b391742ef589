"""Which routed expert reads which tokens, and what each of them needs to be calibrated on its own.

Every expert is a small network with a distribution of inputs of its own: the tokens its router sends it. They are not
stored a second time. The normalised input of an expert's token is one row of the hidden states, normalised again when it
is asked for, so that the memory this takes is that of the routing: k numbers and k weights per token. The hidden states
must therefore not advance while the inputs are in use.

An expert that few tokens reach has a Hessian of low rank. There are two priors to shrink it towards. What enters gate and
up is the same space for all experts, so the mean over all tokens of the layer is a sensible guess. What enters down is
made of neurons that have no counterpart in other experts, so the only sensible guess is the same expert made to read
tokens of others: `sample`.
"""

from collections.abc import Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from quantlab.calibration.collect import Stream, routing
from quantlab.calibration.experts import RoutedExperts, gated
from quantlab.calibration.hidden import HiddenStates
from quantlab.calibration.statistics import Accumulator, Need, SiteStatistics

_ROWS_AT_ONCE: Final = 1024
"""Tokens of one expert computed at once on a CPU: their activations stay in its cache."""


@dataclass(frozen=True)
class ExpertActivity:
    """How much an expert f says to the tokens x it gets, with routing weights g.

    Attributes:
        count: tokens.
        output_norm: sum of ‖f(x)‖₂.
        gated_norm: sum of g · ‖f(x)‖₂; g as the layer uses it, scaling included.
    """

    count: int
    output_norm: float
    gated_norm: float


@dataclass(frozen=True)
class _Reader:
    """The inputs of the experts of one stream, row by row."""

    norm: nn.Module
    hidden: HiddenStates
    experts: RoutedExperts

    def inputs(self, rows: Tensor) -> Tensor:
        """[n, H] of the tokens `rows` [n]."""
        with torch.no_grad():
            normalised: Tensor = self.norm(self.hidden.rows(rows))
            return normalised


class MoeInputs:
    """What the experts of a layer read; made by `collect_moe`.

    Args:
        changed: the model as it is becoming, entering the half layer with the experts.
        original: the unchanged model there; needed for cross terms.
        index: [T, k] int64, the experts of each token.
        weights: [T, k] float32, their weights.
        layer: statistics over all tokens, what shared experts read and the prior of every gate and up.

    Attributes:
        tokens_per_expert: how many tokens each expert gets.
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
        """Numbers of the tokens the expert gets [n] int64, ascending, counted over all samples."""
        return self._rows[expert]

    def gate_weights(self, expert: int) -> Tensor:
        """The routing weight of each of them [n] float32."""
        return self._weights[expert]

    def inputs(self, expert: int) -> Tensor:
        """What the expert reads [n, H]."""
        return self._changed.inputs(self.rows(expert))

    def original_inputs(self, expert: int) -> Tensor:
        """What the same tokens are in the unchanged model [n, H]."""
        assert self._original is not None
        return self._original.inputs(self.rows(expert))

    def sample(self, count: int) -> Tensor:
        """Numbers of at most `count` tokens spread evenly over all, whoever they are routed to [n] int64."""
        count = min(count, self._tokens)
        return torch.arange(count) * self._tokens // max(count, 1)

    def statistics(self, expert: int, needs: Collection[Need]) -> SiteStatistics:
        """Of what enters the expert's gate and up, K = H.

        Raises:
            CheckpointError: an activation is NaN or infinite.
        """
        accumulator = Accumulator(self._changed.hidden.shape[2], needs, device=self._device)
        for rows in self._parts(self.rows(expert)):
            x = self._changed.inputs(rows)
            before = None if "cross" not in needs else self._before(rows)
            accumulator.update(x, before)
        return accumulator.result(where=f"{self.block}, expert {expert}, input site mlp")

    def intermediate(self, expert: int, gate: Tensor, up: Tensor) -> Tensor:
        """What enters the expert's down projection if its gate and up are these [I, H]: [n, I]."""
        with torch.no_grad():
            return gated(self.inputs(expert), gate, up, self._changed.experts.act_fn)

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
        """Of what enters the expert's down projection, K = I.

        Args:
            expert: its number.
            gate, up: [I, H], as they have become; the cross term compares with the unchanged expert on the unchanged tokens.
            needs: what to compute.
            rows: the tokens it reads [n] int64, by default its own; those of `sample` make a prior for an expert that
                gets few.

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

    def activity(self, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> ExpertActivity:
        """How much the expert says if its weights are these, gate and up [I, H], down [H, I]."""
        output, weighted = 0.0, 0.0
        parts = zip(self._parts(self.rows(expert)), self._parts(self.gate_weights(expert)), strict=True)
        for rows, weights in parts:
            with torch.no_grad():
                inner = gated(self._changed.inputs(rows), gate, up, self._changed.experts.act_fn)
                norms = (inner @ down.T).to(torch.float32).norm(dim=1).double().cpu()
            output += norms.sum().item()
            weighted += (norms * weights).sum().item()
        return ExpertActivity(self.tokens_per_expert[expert], output, weighted)

    def _parts(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Few enough to be computed at once; none of none."""
        return tuple(torch.split(tokens, self._step)) if len(tokens) else ()

    def _before(self, rows: Tensor) -> Tensor:
        assert self._original is not None, "the cross term compares with the unchanged model"
        return self._original.inputs(rows)


def _reader(stream: Stream) -> _Reader:
    experts = stream.half.experts
    assert experts is not None, f"{stream.half.block} has no routed experts"
    # the norm is copied: a pass may fold a scale into it while these inputs are in use
    return _Reader(deepcopy(stream.half.norm), stream.hidden, experts)


def collect_moe(changed: Stream, *, needs: Collection[Need] = (), original: Stream | None = None) -> MoeInputs:
    """Route every calibration token through the changed model's router.

    Args:
        changed: the model as it is becoming, entering the half layer with the experts.
        needs: what to compute over all tokens of the layer.
        original: the unchanged model there, with its own hidden states; its tokens are looked at where the changed
            model's router sends them.

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
