"""The calibration text as it passes through one layer, half by half.

There are two cases. If the layer computes with the weights of the source and no edit changes its structure, its
statistics are those of the unchanged model: variants share them, and the text passes through only if one is missing
(`UnchangedFlow`). Otherwise the text passes through the edited layer, and also through the unchanged layer if errors of
earlier layers are compensated (`EditedFlow`).
"""

from functools import partial
from typing import Protocol

from quantlab.calibration.collect import Stream, advance, keep_last_inputs, record
from quantlab.calibration.hidden import HiddenStates, Workspace
from quantlab.calibration.inputs import HalfInputs
from quantlab.run.layer import EditedLayer
from quantlab.run.shared import Unchanged


class Flow(Protocol):
    """The calibration text in one layer; halves are numbered 0 (attention) and 1 (mlp)."""

    def inputs(self, half: int) -> HalfInputs:
        """Statistics of the inputs of a half with its current weights."""
        ...

    def keep_last_inputs(self, half: int) -> None:
        """Called before the linears of a half change stage by stage: keep inputs, so that less is computed again."""
        ...

    def advance(self, half: int) -> None:
        """Called when a half is done: advance the hidden states past it."""
        ...

    def finish_layer(self) -> None:
        """Called when the layer is done."""
        ...


class UnchangedFlow:
    """The text in the unchanged model; it passes through the layer only if a requested statistic is not saved.

    Args:
        layer: a layer that computes with the weights of the source.
        unchanged: the unchanged model.
    """

    def __init__(self, layer: EditedLayer, unchanged: Unchanged) -> None:
        self._layer, self._unchanged = layer, unchanged
        self._hidden: HiddenStates | None = None
        self._half = 0

    def inputs(self, half: int) -> HalfInputs:
        """See `Flow`."""
        return HalfInputs(self._layer.block, partial(self._enter, half), archive=self._unchanged.stages)

    def keep_last_inputs(self, half: int) -> None:
        """See `Flow`."""

    def advance(self, half: int) -> None:
        """See `Flow`."""

    def finish_layer(self) -> None:
        """See `Flow`."""
        if not self._unchanged.has_saved(self._layer.index):
            self._advance_to(2)
            self._unchanged.finish_layer(self._layer.index)

    def _enter(self, half: int) -> Stream:
        return Stream(self._layer.modules.halves[half], self._advance_to(half))

    def _advance_to(self, half: int) -> HiddenStates:
        hidden = self._hidden = self._hidden or self._unchanged.enter(self._layer.index)
        for number in range(self._half, half):
            advance(Stream(self._layer.modules.halves[number], hidden))
        self._half = max(half, self._half)
        return hidden


class EditedFlow:
    """The text in the edited layer, and in the unchanged layer for comparison.

    Args:
        layer: the layer being edited.
        changed: the hidden states that enter it; None for those of the unchanged model.
        unchanged: the unchanged model; required if the layer is compared with it, or if `changed` is None.
        workspace: allocates buffers for the inputs of linears.
    """

    def __init__(
        self, layer: EditedLayer, changed: HiddenStates | None, unchanged: Unchanged | None, workspace: Workspace
    ) -> None:
        self._layer, self._unchanged, self._workspace = layer, unchanged, workspace
        if unchanged is not None and changed is None:
            unchanged.run_ahead(layer.index, layer.modules)
        self._unchanged_hidden = unchanged.enter(layer.index) if unchanged is not None else None
        self._saved = unchanged is not None and unchanged.has_saved(layer.index)
        entering = changed or self._unchanged_hidden
        assert entering is not None, "text enters one of the two models"
        self._hidden = entering
        self._kept: Stream | None = None
        self._original: Stream | None = None

    def inputs(self, half: int) -> HalfInputs:
        """See `Flow`."""
        return HalfInputs(self._layer.block, partial(self._enter, half), original=self._original)

    def keep_last_inputs(self, half: int) -> None:
        """See `Flow`."""
        self._kept = keep_last_inputs(self._enter(half), self._workspace)
        if self._layer.unchanged is not None and self._unchanged_hidden is not None:
            stream = Stream(self._layer.unchanged.halves[half], self._unchanged_hidden)
            self._original = record(stream, self._workspace)

    def advance(self, half: int) -> None:
        """See `Flow`."""
        advance(self._enter(half))
        if self._original is not None and (half == 0 or not self._saved):
            advance(self._original)
        self._kept = self._original = None

    def finish_layer(self) -> None:
        """See `Flow`."""
        if self._layer.unchanged is not None and self._unchanged is not None and not self._saved:
            self._unchanged.finish_layer(self._layer.index)

    def _enter(self, half: int) -> Stream:
        return self._kept or Stream(self._layer.modules.halves[half], self._hidden)
