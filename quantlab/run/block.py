"""One decoder layer at work: its weights are changed stage by stage while calibration text enters it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby

import torch
from torch import Tensor

from quantlab.algorithms.reap import saliency, surgery
from quantlab.architectures.architecture import Architecture
from quantlab.architectures.config import Config
from quantlab.calibration.collect import Stream, advance, collect, record, settle
from quantlab.calibration.hidden import HiddenStates, Workspace
from quantlab.calibration.layer import Half, Layer, Skeleton
from quantlab.calibration.moe import MoeInputs, collect_moe
from quantlab.calibration.statistics import Need, SiteStatistics
from quantlab.checkpoint.reader import TORCH_DTYPES
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.passes.apply import Changed, Group, Inputs, apply_passes, needs_of
from quantlab.plan.folds import Fold, folds_of, unsmoothed
from quantlab.plan.model import Step
from quantlab.run.folding import FOLD_NEEDS, Change, Knowledge, factors_of, folded, unfolded
from quantlab.run.shared import Unchanged
from quantlab.run.weights import check_range

Read = Callable[[Step], Tensor]
At = Callable[[], Stream]
"""Half a layer with the hidden states that enter it, computed when somebody asks."""

_BATCH_BYTES = 1 << 28
"""Memory for the Hessians and weights of experts that are changed at once, and what is made of them; on a CPU."""
_BATCH_SHARE = 5
"""The same as a part of the memory of a GPU: all of it, so that results do not depend on what is free."""
_UNSMOOTHED = "not smoothed: experts share the norm before them"
_UNSCALED = "not scaled: no calibration token reached it"
_SAMPLE_PER_CHANNEL = 4
"""Tokens per channel, of any expert, that the prior of an expert's down projection is made of."""


@dataclass(frozen=True)
class Skeletons:
    """What makes layers: with all experts, and with those that stay (the same where all do)."""

    whole: Skeleton
    reduced: Skeleton


@dataclass(frozen=True)
class BlockTask:
    """What is to be done to one decoder layer.

    Attributes:
        index: of the layer.
        steps: of the block, by name of the weight.
        architecture: its family.
        config: config.json.
        experts: how many routed experts stay, None for all.
    """

    index: int
    steps: Mapping[str, Step]
    architecture: Architecture
    config: Config
    experts: int | None


@dataclass(frozen=True)
class Streams:
    """What flows into a block: the hidden states of the model as it is becoming, those of the unchanged one, or both."""

    changed: HiddenStates | None
    unchanged: Unchanged | None


class BlockWork:
    """One decoder layer at work.

    Args:
        task: what is to be done.
        skeleton: makes the layer; `reduced` makes it with the experts that stay.
        read: the source weight of a step.
        streams: the hidden states that enter the block. Without those of the changed model the unchanged one is watched.
        workspace: room for what the unchanged model sees.

    Attributes:
        changed: what the weights have become, as far as the work has come.
        tokens_per_expert: how many tokens each routed expert got; empty where there are none or none was watched.
        kept: which routed experts stay; empty where all do.
    """

    def __init__(
        self,
        task: BlockTask,
        skeletons: Skeletons,
        read: Read,
        streams: Streams,
        workspace: Workspace,
    ) -> None:
        self._task, self._steps, self._read_source, self._workspace = task, task.steps, read, workspace
        self._skeletons, self._streams = skeletons, streams
        self.changed: dict[str, Changed] = {}
        self.tokens_per_expert: tuple[int, ...] = ()
        self.kept: tuple[int, ...] = ()
        self._folds: dict[str, list[Change]] = {}
        self._notes = dict.fromkeys(unsmoothed(self._steps.values()), _UNSMOOTHED)
        self._follows = streams.changed is not None
        self._layer = skeletons.whole.layer(task.index)
        self._layer.fill(self._stored if self._follows else self._read)
        self._unchanged: Layer | None = None
        if self._follows and streams.unchanged is not None:
            self._unchanged = skeletons.whole.layer(task.index)
            self._unchanged.fill(self._read)
        self._shares = False

    def run(self) -> None:
        """Change every weight of the block; the hidden states are those after it then."""
        folds = folds_of(self._steps.values())
        if not self._follows and not folds and self._task.experts is None:
            self._run_unchanged()
        else:
            self._run_in_order(folds)
        for name, step in self._steps.items():
            if step.outputs and name not in self.changed:
                self.changed[name] = self._stored(name), None

    def _run_unchanged(self) -> None:
        """Watch the unchanged model only. What another variant has seen of it is not computed again."""
        unchanged, index = self._streams.unchanged, self._task.index
        assert unchanged is not None, "one of the two models is watched"
        self._shares = True
        hidden, entered = cache(partial(unchanged.enter, index)), 0

        def at(number: int) -> Stream:
            nonlocal entered
            while entered < number:
                advance(Stream(self._layer.halves[entered], hidden()))
                entered += 1
            return Stream(self._layer.halves[min(number, 1)], hidden())

        for number, half in enumerate(self._layer.halves):
            self._change_half(partial(at, number), half, None)
        if not unchanged.knows(index):
            at(2)
            unchanged.leave(index)

    def _run_in_order(self, folds: Sequence[Fold]) -> None:
        """Watch the model as it is becoming, and the unchanged one beside it where errors are made good."""
        index, unchanged = self._task.index, self._streams.unchanged
        before = unchanged.enter(index) if unchanged is not None else None
        known = unchanged is not None and unchanged.knows(index)
        entering = self._streams.changed or before
        assert entering is not None, "one of the two models is watched"
        for number in range(2):
            half = self._layer.halves[number]
            if half.experts is not None and self._task.experts is not None:
                self._remove_experts(Stream(half, entering), self._task.experts)
                half = self._layer.halves[number]
            self._fold(Stream(half, entering), [fold for fold in folds if fold.site in _sites_of(half)])
            stream, original = settle(Stream(half, entering), self._workspace), None
            if self._unchanged is not None and before is not None:
                original = record(Stream(self._unchanged.halves[number], before), self._workspace)
            self._change_half(partial(_itself, stream), half, original)
            advance(stream)
            if original is not None and (number == 0 or not known):
                advance(original)
        if self._unchanged is not None and unchanged is not None and not known:
            unchanged.leave(index)

    def _change_half(self, at: At, half: Half, original: Stream | None) -> None:
        for stage in half.stages:
            self._change_stage(at, half, stage, original)
        if half.experts is not None:
            self._change_experts(at, original)

    def _known(self, what: str, needs: Collection[Need], compute: Callable[[], SiteStatistics]) -> SiteStatistics:
        """Statistics of this block: from another variant, where they do not depend on this one."""
        if not self._shares or self._streams.unchanged is None:
            return compute()
        return self._streams.unchanged.stages.statistics(f"layer {self._task.index} {what}", needs, compute)

    def _read(self, name: str) -> Tensor:
        """A weight as the source has it: of the expert that comes into its slot, and with the folds done so far."""
        step = self._steps[name]
        expert = step.claim.expert
        if self.kept and expert is not None:
            step = self._steps[step.claim.in_expert(self.kept[expert])]
        weight = self._read_source(step)
        if self.kept and step.claim.role == "router":
            weight = weight[list(self.kept)]
        for change in self._folds.get(name, ()):
            weight = change(weight)
        return weight

    def _stored(self, name: str) -> Tensor:
        """A weight that no pass changes, as it will be stored."""
        return self._read(name).to(TORCH_DTYPES[self._steps[name].dtype])

    def _remove_experts(self, stream: Stream, stay: int) -> None:
        """Find the experts that say least, and go on with a layer without them."""
        moe = collect_moe(stream)
        sums, tokens = torch.zeros(len(moe.tokens_per_expert)), torch.tensor(moe.tokens_per_expert)
        for expert in range(len(sums)):
            names = self._task.architecture.expert_names(self._task.index, expert)
            gate, up, down = (self._layer.weights[name] for name in names)
            sums[expert] = moe.activity(expert, gate, up, down).gated_norm
        assert self._task.architecture.mixture is not None, "the layer has routed experts"
        routing = self._task.architecture.mixture.routing(self._task.config)
        chosen = surgery(
            saliency(sums, tokens),
            kept=stay,
            groups=routing.groups,
            picked=routing.top_k,
            open_groups=routing.top_groups,
        )
        self.kept, self.tokens_per_expert = tuple(chosen.kept.tolist()), moe.tokens_per_expert
        reduced = self._skeletons.reduced.layer(self._task.index)
        reduced.fill(self._stored if self._follows else self._read)
        for name, result in self.changed.items():  # of the attention, which comes first
            if self._follows:
                reduced.weights[name].copy_(_dense(result[0]))
        self._layer = reduced

    def _fold(self, stream: Stream, folds: Sequence[Fold]) -> None:
        """Find the factors of every fold of half a layer, then apply them."""
        if not folds:
            return
        sites = [fold.site for fold in folds if any(step.claim.expert is None for step in fold.consumers)]
        wanted = [site for site in stream.half.sites if site in sites]
        moe = collect_moe(stream) if stream.half.experts is not None else None
        found = collect(stream, wanted, needs=FOLD_NEEDS) if wanted else {}
        known = Knowledge(found, moe, dict(self._layer.weights), stream.hidden.tokens)
        if moe is not None and not self.kept:
            self.tokens_per_expert = moe.tokens_per_expert
        for fold in folds:
            expert = fold.producers[0].claim.expert
            if moe is not None and expert is not None and not moe.tokens_per_expert[expert]:
                self._notes |= {step.claim.name: _UNSCALED for step in fold.consumers}
            channels = fold.consumers[0].source.shape[1]
            claim = fold.producers[0].claim
            rows = self._task.architecture.fed_rows(claim, self._task.config, channels=channels)
            factors = factors_of(fold, known, rows).cpu()  # where weights are read to
            for step in fold.consumers:
                self._add_fold(step, partial(folded, factors=factors))
            for step in fold.producers:
                self._add_fold(step, partial(unfolded, factors=factors, rows=rows))
        for name in self._folds:
            self._layer.weights[name].copy_(self._stored(name) if self._follows else self._read(name))
            if self._unchanged is not None:
                self._unchanged.weights[name].copy_(self._read(name))

    def _add_fold(self, step: Step, change: Change) -> None:
        self._folds.setdefault(step.claim.name, []).append(change)

    def _change_stage(self, at: At, half: Half, stage: Sequence[str], original: Stream | None) -> None:
        """Change the linears of a stage that are no routed experts."""
        members = {site: [self._steps[name] for name in half.sites[site].weights] for site in stage}
        needs = {site: self._needs(steps) for site, steps in members.items()}
        watched = [site for site in stage if needs[site]]
        together = set().union(*needs.values())
        collected = cache(lambda: collect(at(), watched, needs=together, original=original))
        found = {site: self._known(site, together, partial(_of_site, collected, site)) for site in watched}
        for site, steps in members.items():
            self._change([(steps, _inputs(found[site]) if site in found else None)])

    def _change_experts(self, at: At, original: Stream | None) -> None:
        """Change the routed experts, one after the other: gate and up, then down with the changed ones before it."""
        experts: dict[int, list[Step]] = {}
        for step in self._steps.values():
            if step.claim.expert is not None and step.claim.role == "routed_experts" and step.outputs:
                experts.setdefault(step.claim.expert, []).append(step)
        needs = self._needs([step for steps in experts.values() for step in steps])
        moe = cache(lambda: collect_moe(at(), needs=needs, original=original)) if needs else None
        if moe is not None and not self.kept:
            self.tokens_per_expert = self._count_tokens(moe)
        at_once = self._experts_at_once(experts)
        numbers = list(experts)
        for start in range(0, len(numbers), at_once):
            batch = numbers[start : start + at_once]
            enter = {expert: _at("mlp", experts[expert]) for expert in batch}
            self._change([(enter[expert], self._expert_inputs(moe, expert, enter[expert])) for expert in batch])
            leave = {expert: _at("down", experts[expert]) for expert in batch}
            self._change(
                [(leave[expert], self._down_inputs(moe, expert, enter[expert], leave[expert])) for expert in batch]
            )

    def _experts_at_once(self, experts: Mapping[int, Sequence[Step]]) -> int:
        """How many fit: six matrices of the size of a Hessian and eight of that of the weights, in float32."""
        device = self._workspace.device
        room = _BATCH_BYTES
        if device.type == "cuda":
            room = torch.cuda.get_device_properties(device).total_memory // _BATCH_SHARE
        columns = max(step.source.shape[1] for steps in experts.values() for step in steps)
        elements = max(step.source.elements for steps in experts.values() for step in steps)
        return max(room // (24 * columns**2 + 64 * elements), 1)

    def _count_tokens(self, moe: Callable[[], MoeInputs]) -> tuple[int, ...]:
        if not self._shares or self._streams.unchanged is None:
            return moe().tokens_per_expert
        found = self._streams.unchanged.stages.tensors(
            f"layer {self._task.index} tokens per expert",
            lambda: {"tokens_per_expert": torch.tensor(moe().tokens_per_expert)},
        )
        return tuple(found["tokens_per_expert"].tolist())

    def _expert_inputs(self, moe: Callable[[], MoeInputs] | None, expert: int, steps: Sequence[Step]) -> Inputs | None:
        needs = self._needs(steps)
        if moe is None or not needs:
            return None
        prior = self._known("mlp of all tokens", needs, lambda: moe().layer)
        return _inputs(self._known(f"expert {expert} mlp", needs, lambda: moe().statistics(expert, needs)), prior=prior)

    def _down_inputs(
        self, moe: Callable[[], MoeInputs] | None, expert: int, enter: Sequence[Step], steps: Sequence[Step]
    ) -> Inputs | None:
        needs = self._needs(steps)
        if moe is None or not needs:
            return None
        gate, up = (
            self._layer.weights[next(step.claim.name for step in enter if f".{kind}_proj." in step.claim.name)]
            for kind in ("gate", "up")
        )

        number = self.kept[expert] if self.kept else expert

        def own() -> SiteStatistics:
            return moe().down_statistics(expert, gate, up, needs, unchanged_expert=number)

        def prior() -> SiteStatistics:
            rows = moe().sample(_SAMPLE_PER_CHANNEL * gate.shape[0])
            return moe().down_statistics(expert, gate, up, needs, rows=rows, unchanged_expert=number)

        name = f"expert {expert} down"
        return _inputs(self._known(name, needs, own), prior=self._known(f"{name} of all tokens", needs, prior))

    def _needs(self, steps: Collection[Step]) -> set[Need]:
        """What the passes want to know; the unchanged model's inputs only where it runs beside."""
        needs = {need for step in steps for need in needs_of(step.passes)}
        return needs if self._unchanged is not None else needs - {"cross"}

    def _change(self, sites: Sequence[tuple[Sequence[Step], Inputs | None]]) -> None:
        """Change the linears of one site, or of the same site of several experts; those under the same passes together."""
        groups: dict[tuple[object, ...], list[Group]] = {}
        for steps, inputs in sites:
            for key, members in groupby(steps, key=lambda step: (step.passes, step.dtype)):
                if not key[0]:
                    continue
                weights = {step.claim.name: self._read(step.claim.name).to(self._workspace.device) for step in members}
                shape = (sum(map(len, weights.values())), next(iter(weights.values())).shape[1])
                groups.setdefault((*key, shape), []).append(Group(weights, inputs))
        for together in groups.values():
            step = self._steps[next(iter(together[0].weights))]
            changed = apply_passes(together, step.passes, dtype=TORCH_DTYPES[step.dtype])
            for group in together:
                for name, weight in group.weights.items():
                    result, report = changed[name]
                    if report is not None and not report.fallback:
                        report = replace(report, fallback=self._notes.get(name, ""))
                    check_range(self._steps[name], weight, result)
                    self.changed[name] = result.to("cpu"), report
                    if self._follows:
                        self._layer.weights[name].copy_(_dense(result))


def _itself(stream: Stream) -> Stream:
    return stream


def _of_site(collected: Callable[[], Mapping[str, SiteStatistics]], site: str) -> SiteStatistics:
    return collected()[site]


def _at(site: str, steps: Sequence[Step]) -> list[Step]:
    return [step for step in steps if step.claim.rule is not None and step.claim.rule.site == site]


def _dense(changed: Tensor | QuantizedMatrix) -> Tensor:
    return changed if isinstance(changed, Tensor) else changed.dequantize(torch.float32)


def _sites_of(half: Half) -> set[str]:
    return {site for stage in half.stages for site in stage} | ({"mlp", "down"} if half.experts is not None else set())


def _inputs(found: SiteStatistics, *, prior: SiteStatistics | None = None) -> Inputs:
    return Inputs(
        tokens=found.count,
        mean_square=found.mean_square,
        hessian=found.hessian,
        cross=found.cross,
        prior=None if prior is None else Inputs(prior.count, prior.mean_square, prior.hessian, prior.cross, None),
    )
