"""One decoder layer at work: its weights are changed stage by stage while calibration text enters it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from quantlab.calibration.collect import Stream, advance, collect
from quantlab.calibration.hidden import HiddenStates
from quantlab.calibration.layer import Layer, Skeleton
from quantlab.calibration.moe import MoeInputs, collect_moe
from quantlab.calibration.statistics import Need, SiteStatistics
from quantlab.checkpoint.reader import TORCH_DTYPES
from quantlab.passes.apply import Changed, Inputs, apply_passes, needs_of
from quantlab.plan.model import Step
from quantlab.run.weights import check_range

Read = Callable[[Step], Tensor]

_SAMPLE_PER_CHANNEL = 4
"""Tokens per channel, of any expert, that the prior of an expert's down projection is made of."""


class BlockWork:
    """One decoder layer at work.

    Args:
        skeleton: makes the layer.
        index: of the layer.
        steps: of the block, by name of the weight.
        read: the source weight of a step.
        streams: the hidden states that enter the block: of the model as it is becoming ("changed"), of the unchanged one
            ("original"), or both.

    Attributes:
        changed: what the weights have become, as far as the work has come.
        tokens_per_expert: how many tokens each routed expert got; empty where there are none or none was watched.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        index: int,
        steps: Mapping[str, Step],
        read: Read,
        streams: Mapping[str, HiddenStates],
    ) -> None:
        self._steps, self._read = steps, read
        self.changed: dict[str, Changed] = {}
        self.tokens_per_expert: tuple[int, ...] = ()
        self._follows = "changed" in streams
        self._hidden = streams["changed" if self._follows else "original"]
        self._layer = skeleton.layer(index)
        self._layer.fill(self._stored if self._follows else self._source)
        self._unchanged: Layer | None = None
        if len(streams) == 2:
            self._unchanged = skeleton.layer(index)
            self._unchanged.fill(self._source)
            self._unchanged_hidden = streams["original"]

    def run(self) -> None:
        """Change every weight of the block; the hidden states are those after it then."""
        for number, half in enumerate(self._layer.halves):
            stream, original = Stream(half, self._hidden), None
            if self._unchanged is not None:
                original = Stream(self._unchanged.halves[number], self._unchanged_hidden)
            for stage in half.stages or ((),):
                self._change_stage(stream, stage, original)
            if half.experts is not None:
                self._change_experts(stream, original)
            advance(stream)
            if original is not None:
                advance(original)
        for name, step in self._steps.items():
            if step.outputs and name not in self.changed:
                self.changed[name] = self._stored(name), None

    def _source(self, name: str) -> Tensor:
        return self._read(self._steps[name])

    def _stored(self, name: str) -> Tensor:
        """A weight that no pass changes, as it will be stored."""
        step = self._steps[name]
        return self._read(step).to(TORCH_DTYPES[step.dtype])

    def _change_stage(self, stream: Stream, stage: Sequence[str], original: Stream | None) -> None:
        """Change the linears of a stage that are no routed experts."""
        members = {site: [self._steps[name] for name in stream.half.sites[site].weights] for site in stage}
        needs = {site: _needs(steps) for site, steps in members.items()}
        watched = [site for site in stage if needs[site]]
        found: Mapping[str, SiteStatistics] = {}
        if watched:
            found = collect(stream, watched, needs=set().union(*needs.values()), original=original)
        for site, steps in members.items():
            self._change(steps, _inputs(found[site]) if site in found else None)

    def _change_experts(self, stream: Stream, original: Stream | None) -> None:
        """Change the routed experts, one after the other: gate and up, then down with the changed ones before it."""
        experts: dict[int, list[Step]] = {}
        for step in self._steps.values():
            if step.claim.expert is not None and step.claim.role == "routed_experts":
                experts.setdefault(step.claim.expert, []).append(step)
        needs = _needs([step for steps in experts.values() for step in steps])
        moe = collect_moe(stream, needs=needs, original=original) if needs else None
        if moe is not None:
            self.tokens_per_expert = moe.tokens_per_expert
        for expert, steps in experts.items():
            enter = [step for step in steps if step.claim.rule and step.claim.rule.site == "mlp"]
            leave = [step for step in steps if step.claim.rule and step.claim.rule.site == "down"]
            self._change(enter, self._expert_inputs(moe, expert, enter))
            self._change(leave, self._down_inputs(moe, expert, enter, leave))

    def _expert_inputs(self, moe: MoeInputs | None, expert: int, steps: Sequence[Step]) -> Inputs | None:
        needs = _needs(steps)
        if moe is None or not needs:
            return None
        return _inputs(moe.statistics(expert, needs), prior=moe.layer)

    def _down_inputs(
        self, moe: MoeInputs | None, expert: int, enter: Sequence[Step], steps: Sequence[Step]
    ) -> Inputs | None:
        needs = _needs(steps)
        if moe is None or not needs:
            return None
        gate, up = (
            self._layer.weights[next(step.claim.name for step in enter if f".{kind}_proj." in step.claim.name)]
            for kind in ("gate", "up")
        )
        rows = moe.sample(_SAMPLE_PER_CHANNEL * gate.shape[0])
        prior = moe.down_statistics(expert, gate, up, needs, rows=rows)
        return _inputs(moe.down_statistics(expert, gate, up, needs), prior=prior)

    def _change(self, steps: Sequence[Step], inputs: Inputs | None) -> None:
        """Change linears that read the same activations; those under the same passes together."""
        for passes, group in groupby(steps, key=lambda step: (step.passes, step.dtype)):
            members = list(group)
            if not passes[0]:
                continue
            weights = {step.claim.name: self._read(step).to(self._hidden.device) for step in members}
            changed = apply_passes(weights, passes[0], dtype=TORCH_DTYPES[passes[1]], inputs=inputs)
            for name, result in changed.items():
                check_range(self._steps[name], weights[name], result[0])
                self.changed[name] = result
                if self._follows:
                    values = result[0]
                    dense = values if isinstance(values, Tensor) else values.dequantize(torch.float32)
                    self._layer.weights[name].copy_(dense)


def _needs(steps: Collection[Step]) -> set[Need]:
    return {need for step in steps for need in needs_of(step.passes)}


def _inputs(found: SiteStatistics, *, prior: SiteStatistics | None = None) -> Inputs:
    return Inputs(
        tokens=found.count,
        mean_square=found.mean_square,
        hessian=found.hessian,
        cross=found.cross,
        prior=None if prior is None else Inputs(prior.count, prior.mean_square, prior.hessian, prior.cross, None),
    )
