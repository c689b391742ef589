"""Layer edits: the changes a variant makes to one half of a decoder layer, in order.

    RemoveExperts    which routed experts stay, and the smaller layer          passes/removal.py
    FoldScales       factors per channel, folded into neighbours               passes/fold.py
    ChangeStage      linears of one stage: pruned, quantized                   passes/apply.py
    ChangeExperts    the same for routed experts: gate and up, then down       passes/apply.py

Every edit declares the statistics it needs, requests them, calls the function of `passes/` that binds it to its
algorithm (tensors and statistics in, tensors out) and stores the results in the layer. The first two change the
structure of a whole half; the others change linears in the order of the forward pass, each stage with statistics that
reflect the changed stages before it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Final, Protocol

import torch

from quantlab.calibration.inputs import ExpertInputs, HalfInputs
from quantlab.checkpoint.reader import TORCH_DTYPES
from quantlab.numerics.statistics import Need, SiteStatistics
from quantlab.passes.apply import Group, Inputs, apply_passes, needs_of
from quantlab.passes.fold import FoldedLinear, divided_rows, fold_factors, fold_needs, scaled_columns
from quantlab.passes.removal import ExpertOutputs, experts_that_stay
from quantlab.plan.folds import Fold, folds_of
from quantlab.plan.model import Step, VariantPlan
from quantlab.recipe.algorithms import ExpertRemoval
from quantlab.run.layer import EditedLayer
from quantlab.run.weights import Change

_BATCH_BYTES: Final = 1 << 28
"""Memory for the Hessians, weights and results of one batch of experts on a CPU."""
_BATCH_SHARE: Final = 5
"""The same on a GPU, as a divisor of its total memory, so that results do not depend on free memory."""
_CHECKED_TOKENS: Final = 128
"""Tokens of the check that folds change nothing but the rounding."""
_UNSCALED: Final = "not scaled: no calibration token reached it"


class LayerEdit(Protocol):
    """One edit of half a layer."""

    def needs(self, layer: EditedLayer) -> frozenset[Need]:
        """The input statistics that it needs."""
        ...

    def apply(self, layer: EditedLayer, inputs: HalfInputs) -> None:
        """Request the statistics and change the layer.

        Raises:
            CheckpointError: activations or results are not finite.
        """
        ...


def structure_edits(variant: VariantPlan, layer: EditedLayer, half: int) -> Iterator[LayerEdit]:
    """The edits that change the structure of a half (0 attention, 1 mlp): experts removed, then scales folded."""
    modules = layer.modules.halves[half]
    sites = {site for stage in modules.stages for site in stage}
    if modules.experts is not None:
        sites |= {"mlp", "down"}
        if variant.removal is not None and variant.experts is not None:
            yield RemoveExperts(variant.removal, variant.experts)
    folds = tuple(fold for fold in folds_of(layer.steps) if fold.site in sites)
    if folds:
        yield FoldScales(folds)


def linear_edits(layer: EditedLayer, half: int) -> Iterator[LayerEdit]:
    """The edits that change the linears of a half, in the order of its forward pass."""
    modules = layer.modules.halves[half]
    for stage in modules.stages:
        yield ChangeStage(
            {site: tuple(layer.weights.steps[name] for name in modules.sites[site].weights) for site in stage}
        )
    if modules.experts is not None:
        yield ChangeExperts()


@dataclass(frozen=True)
class RemoveExperts:
    """Remove whole routed experts.

    Attributes:
        algorithm: chooses the experts.
        kept: number of experts that stay.
    """

    algorithm: ExpertRemoval
    kept: int

    def needs(self, layer: EditedLayer) -> frozenset[Need]:
        """No input statistics: it uses the norms of the experts' outputs."""
        return frozenset()

    def apply(self, layer: EditedLayer, inputs: HalfInputs) -> None:
        """See `LayerEdit`."""
        routed = inputs.experts().routed
        layer.tokens_per_expert = routed.tokens_per_expert
        norms = torch.zeros(len(routed.tokens_per_expert))
        for expert in range(len(norms)):
            norms[expert] = routed.gated_norm(expert, *layer.expert(expert))
        mixture = layer.model.architecture.mixture
        assert mixture is not None, "the layer has routed experts"
        outputs = ExpertOutputs(torch.tensor(routed.tokens_per_expert), norms)
        routing = mixture.routing(layer.model.config)
        kept = experts_that_stay(self.algorithm, outputs, kept=self.kept, routing=routing)
        layer.keep_experts(kept)


@dataclass(frozen=True)
class FoldScales:
    """Fold scales into the producers and consumers of input sites. All factors are computed before any is applied.

    Attributes:
        folds: folds of one half, in the order of its forward pass.
    """

    folds: tuple[Fold, ...]

    def needs(self, layer: EditedLayer) -> frozenset[Need]:
        """See `LayerEdit`."""
        return frozenset().union(*(fold_needs(fold.algorithm) for fold in self.folds))

    def apply(self, layer: EditedLayer, inputs: HalfInputs) -> None:
        """See `LayerEdit`."""
        outside = [fold.site for fold in self.folds if any(step.tensor.expert is None for step in fold.consumers)]
        found = inputs.sites(list(dict.fromkeys(outside)), self.needs(layer))
        experts = None
        if any(step.tensor.expert is not None for fold in self.folds for step in fold.consumers):
            experts = inputs.experts()
            layer.tokens_per_expert = layer.tokens_per_expert if layer.kept else experts.tokens
        changes: list[tuple[str, Change]] = []
        for fold in self.folds:
            changes += self._changes(layer, fold, found, experts)
        half, hidden = inputs.excerpt(_CHECKED_TOKENS)
        layer.fold(changes, lambda: half.update(hidden))

    def _changes(
        self,
        layer: EditedLayer,
        fold: Fold,
        found: Mapping[str, SiteStatistics],
        experts: ExpertInputs | None,
    ) -> Iterator[tuple[str, Change]]:
        """The change of every producer and consumer of a fold."""
        tensor, channels = fold.producers[0].tensor, fold.consumers[0].source.shape[1]
        if experts is not None and tensor.expert is not None and not experts.tokens[tensor.expert]:
            layer.notes |= {step.tensor.name: _UNSCALED for step in fold.consumers}

        def statistics(expert: int | None, needs: Collection[Need]) -> SiteStatistics:
            if expert is None:
                return found[fold.site]
            assert experts is not None, "an expert has its own input statistics"
            if fold.site == "mlp":
                return experts.gate_up(expert, needs)
            gate, up, _ = layer.expert(expert)
            return experts.down(expert, gate, up, needs)

        linears = [
            FoldedLinear(
                layer.modules.weights[step.tensor.name], step.tensor.expert, step.quantize, TORCH_DTYPES[step.dtype]
            )
            for step in fold.consumers
            if step.quantize and step.quantize.algorithm == fold.algorithm
        ]
        matrices = [step for step in (*fold.producers, *fold.consumers) if len(step.source.shape) == 2]
        rows = layer.model.architecture.fed_rows(tensor, layer.model.config, channels=channels)
        factors = fold_factors(
            fold.algorithm,
            linears,
            statistics,
            rows=rows,
            exact=any(step.quantize is None for step in matrices),
            tokens=layer.model.tokens,
        ).cpu()  # the device of source weights
        for step in fold.consumers:
            yield step.tensor.name, partial(scaled_columns, factors=factors)
        for step in fold.producers:
            yield step.tensor.name, partial(divided_rows, factors=factors, rows=rows)


@dataclass(frozen=True)
class ChangeStage:
    """Prune or quantize the linears of one stage, except routed experts.

    Attributes:
        sites: the linears that read each input site of the stage, by site.
    """

    sites: Mapping[str, tuple[Step, ...]]

    def needs(self, layer: EditedLayer) -> frozenset[Need]:
        """See `LayerEdit`."""
        return _needs(layer, [step for steps in self.sites.values() for step in steps])

    def apply(self, layer: EditedLayer, inputs: HalfInputs) -> None:
        """See `LayerEdit`."""
        watched = [site for site, steps in self.sites.items() if _needs(layer, steps)]
        found = inputs.sites(watched, self.needs(layer)) if watched else {}
        for site, steps in self.sites.items():
            _change(layer, [(steps, Inputs(found[site]) if site in found else None)])


@dataclass(frozen=True)
class ChangeExperts:
    """Prune or quantize the routed experts in batches: gate and up, then down on inputs of the changed gate and up."""

    def needs(self, layer: EditedLayer) -> frozenset[Need]:
        """See `LayerEdit`."""
        return _needs(layer, [step for steps in self._experts(layer).values() for step in steps])

    def apply(self, layer: EditedLayer, inputs: HalfInputs) -> None:
        """See `LayerEdit`."""
        members, needs = self._experts(layer), self.needs(layer)
        experts = inputs.experts(needs) if needs else None
        if experts is not None and not layer.kept:
            layer.tokens_per_expert = experts.tokens
        numbers, at_once = list(members), _experts_at_once(layer.device, members)
        for start in range(0, len(numbers), at_once):
            batch = numbers[start : start + at_once]
            gate_up = {expert: _reading("mlp", members[expert]) for expert in batch}
            _change(
                layer, [(steps, _gate_up_inputs(layer, experts, expert, steps)) for expert, steps in gate_up.items()]
            )
            down = {expert: _reading("down", members[expert]) for expert in batch}
            _change(layer, [(steps, _down_inputs(layer, experts, expert, steps)) for expert, steps in down.items()])

    def _experts(self, layer: EditedLayer) -> dict[int, list[Step]]:
        found: dict[int, list[Step]] = {}
        for step in layer.steps:
            if step.tensor.expert is not None and step.tensor.role == "routed_experts" and step.outputs:
                found.setdefault(step.tensor.expert, []).append(step)
        return found


def _gate_up_inputs(
    layer: EditedLayer, experts: ExpertInputs | None, expert: int, steps: Sequence[Step]
) -> Inputs | None:
    needs = _needs(layer, steps)
    if experts is None or not needs:
        return None
    prior = experts.gate_up_prior(needs)
    return Inputs(experts.gate_up(expert, needs), prior)


def _down_inputs(layer: EditedLayer, experts: ExpertInputs | None, expert: int, steps: Sequence[Step]) -> Inputs | None:
    needs = _needs(layer, steps)
    if experts is None or not needs:
        return None
    gate, up, _ = layer.expert(expert)
    number = layer.kept[expert] if layer.kept else expert
    return Inputs(
        experts.down(expert, gate, up, needs, unchanged_expert=number),
        experts.down_prior(expert, gate, up, needs, unchanged_expert=number),
    )


def _needs(layer: EditedLayer, steps: Collection[Step]) -> frozenset[Need]:
    """The statistics that the passes of steps need; cross terms only if the unchanged layer runs too."""
    needs = frozenset(need for step in steps for need in needs_of(step.passes))
    return needs if layer.unchanged is not None else needs - {"cross"}


def _experts_at_once(device: torch.device, experts: Mapping[int, Sequence[Step]]) -> int:
    """Experts per batch; each needs six float32 matrices of Hessian size and sixteen of weight size."""
    room = _BATCH_BYTES
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory // _BATCH_SHARE
    columns = max(step.source.shape[1] for steps in experts.values() for step in steps)
    elements = max(step.source.elements for steps in experts.values() for step in steps)
    return max(room // (24 * columns**2 + 64 * elements), 1)


def _reading(site: str, steps: Sequence[Step]) -> list[Step]:
    return [step for step in steps if step.tensor.rule is not None and step.tensor.rule.site == site]


def _change(layer: EditedLayer, sites: Sequence[tuple[Sequence[Step], Inputs | None]]) -> None:
    """Change the linears of one site, or of the same site of several experts, batched by passes, dtype and shape."""
    groups: dict[tuple[object, ...], list[Group]] = {}
    for steps, inputs in sites:
        for key, members in groupby(steps, key=lambda step: (step.passes, step.dtype)):
            if not key[0]:
                continue
            weights = {step.tensor.name: layer.weights.source(step.tensor.name).to(layer.device) for step in members}
            shape = (sum(map(len, weights.values())), next(iter(weights.values())).shape[1])
            groups.setdefault((*key, shape), []).append(Group(weights, inputs))
    for together in groups.values():
        step = layer.weights.steps[next(iter(together[0].weights))]
        results = apply_passes(together, step.passes, dtype=TORCH_DTYPES[step.dtype])
        for group in together:
            for name, weight in group.weights.items():
                layer.set(name, weight, *results[name])
