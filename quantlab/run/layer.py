"""One decoder layer while its weights are edited: the modules that compute with them, and the results so far."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from quantlab.architectures.architecture import Architecture
from quantlab.architectures.config import Config
from quantlab.calibration.layer import Layer, Skeleton
from quantlab.errors import CheckpointError
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.passes.apply import WeightReport
from quantlab.passes.removal import without_experts
from quantlab.plan.folds import unsmoothed
from quantlab.plan.model import Step
from quantlab.run.weights import BlockWeights, Change

_FOLD_ERROR: Final = 1e-4
"""Largest relative change of the output of half a layer by its folds, computed in float32; rounding makes about 1e-6."""
_FOLD_ROUNDING: Final = 4
"""The same in 16 bits, in units of the dtype's precision."""
_UNSMOOTHED = "not smoothed: experts share the norm before them"


@dataclass(frozen=True)
class Skeletons:
    """Skeletons with all experts, and with those that stay; the same skeleton if all stay."""

    whole: Skeleton
    reduced: Skeleton


@dataclass(frozen=True)
class Model:
    """The model that a layer belongs to.

    Attributes:
        architecture: its family.
        config: its config.json.
        skeletons: allocate its layers.
        follows: whether the layer computes with its changed weights (`propagate: quantized`) or with those of the source.
        compares: whether the unchanged layer runs too.
        tokens: number of calibration tokens.
    """

    architecture: Architecture
    config: Config
    skeletons: Skeletons
    follows: bool
    compares: bool
    tokens: int


class EditedLayer:
    """A decoder layer whose weights are being edited.

    Args:
        model: the model it belongs to.
        index: index of the layer.
        weights: weights of its block.

    Attributes:
        modules: the layer with its current weights.
        unchanged: the layer with the source's weights, folds included; None without comparison.
        tokens_per_expert: calibration tokens routed to each expert; empty if routing was not recorded.
        kept: numbers of the routed experts that stay; empty if all stay.
        notes: fallback texts by weight, for reports whose passes had no fallback.
    """

    def __init__(self, model: Model, index: int, weights: BlockWeights) -> None:
        self.model, self.index, self.weights = model, index, weights
        whole = model.skeletons.whole
        self.modules: Layer = whole.layer(index)
        self.modules.fill(self._current)
        self.unchanged: Layer | None = whole.layer(index) if model.compares else None
        if self.unchanged is not None:
            self.unchanged.fill(weights.source)
        self.tokens_per_expert: tuple[int, ...] = ()
        self.kept: tuple[int, ...] = ()
        self.notes = dict.fromkeys(unsmoothed(weights.steps.values()), _UNSMOOTHED)

    @property
    def block(self) -> str:
        """Name of the layer's block."""
        return self.modules.block

    @property
    def device(self) -> torch.device:
        """The device of the layer."""
        return self.model.skeletons.whole.device

    @property
    def steps(self) -> Iterable[Step]:
        """The steps of the plan for all weights."""
        return self.weights.steps.values()

    def expert(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Current gate, up [I, H] and down [H, I] of a routed expert."""
        names = self.model.architecture.expert_names(self.index, number)
        gate, up, down = (self.modules.weights[name] for name in names)
        return gate, up, down

    def keep_experts(self, kept: Sequence[int]) -> None:
        """Replace the layer by one with only these routed experts, renumbered in order."""
        before, self.kept = self.modules.weights, tuple(kept)
        self.weights.restructure(partial(without_experts, kept=kept))
        self.modules = self.model.skeletons.reduced.layer(self.index)
        self.modules.fill(lambda name: before[name] if self.weights.changed(name) else self._current(name))

    def fold(self, changes: Iterable[tuple[str, Change]], update: Callable[[], Tensor]) -> None:
        """Apply folds to weights, in order; a weight may take part in several.

        Args:
            changes: the change of every weight, by name.
            update: the output of the half layer with its current weights, for some tokens.

        Raises:
            CheckpointError: the folded weights, before they are rounded, compute something else than the weights before.
        """
        changes = list(changes)
        names = list(dict.fromkeys(name for name, _ in changes))
        if self.model.follows:
            self._fill(self.modules, [name for name in names if self.weights.is_rounded(name)])
        before = update()
        for name, change in changes:
            self.weights.fold(name, change)
        self._fill(self.modules, names)
        self._check_fold(before, update())
        if self.model.follows:
            for name in names:
                self.modules.weights[name].copy_(self._current(name))
        if self.unchanged is not None:
            self._fill(self.unchanged, names)

    def _fill(self, layer: Layer, names: Iterable[str]) -> None:
        """Set weights of a layer to those before rounding."""
        for name in names:
            layer.weights[name].copy_(self.weights.source(name))

    def _check_fold(self, before: Tensor, after: Tensor) -> None:
        error = ((after - before).float().norm() / before.float().norm().clamp_min(1e-30)).item()
        limit = _FOLD_ERROR if before.dtype == torch.float32 else _FOLD_ROUNDING * torch.finfo(before.dtype).eps
        if not error <= limit:  # NaN as well
            raise CheckpointError(
                "scales folded into a layer changed what it computes",
                where=f"{self.block} of {self.model.architecture.class_name}",
                found=f"relative change {error:.2g} of the output before rounding; rounding of sums allows {limit:.2g}",
                fix="quantize it without awq and smoothquant, and report the model: one of its parameters is not known to quantlab",
            )

    def set(self, name: str, weight: Tensor, result: Tensor | QuantizedMatrix, report: WeightReport | None) -> None:
        """Replace a weight by the result of the passes; arguments as those of `BlockWeights.set`.

        Raises:
            CheckpointError: the dtype the weight is stored in cannot hold the result.
        """
        if report is not None and not report.fallback:
            report = replace(report, fallback=self.notes.get(name, ""))
        self.weights.set(name, weight, result, report)
        if self.model.follows:
            dense = result if isinstance(result, Tensor) else result.dequantize(torch.float32)
            self.modules.weights[name].copy_(dense)

    def _current(self, name: str) -> Tensor:
        return self.weights.stored(name) if self.model.follows else self.weights.source(name)
