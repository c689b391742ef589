"""The calibration text on its way through one layer, half by half.

There are two ways. If the layer computes with the weights of the source and no edit changes its function, its statistics are
those of the unchanged model: other variants share them, and the text passes through only if something is missing
(`UnchangedFlow`). Else it passes through the edited layer, and through the unchanged one beside it where errors of earlier
layers are compensated (`EditedFlow`).
"""

from functools import partial
from typing import Protocol

from quantlab.calibration.collect import Stream, advance, record, settle
from quantlab.calibration.hidden import HiddenStates, Workspace
from quantlab.calibration.inputs import HalfInputs
from quantlab.run.layer import EditedLayer
from quantlab.run.shared import Unchanged


class Flow(Protocol):
    """The text in one layer; halves are numbered 0 (attention) and 1 (mlp)."""

    def inputs(self, half: int) -> HalfInputs:
        """Statistics of the inputs of a half, as its weights are now."""
        ...

    def settle(self, half: int) -> None:
        """From now on only linears of the half change, stage by stage: its parts before them are computed once."""
        ...

    def advance(self, half: int) -> None:
        """The half is done: the hidden states become those after it."""
        ...

    def leave(self) -> None:
        """The layer is done."""
        ...


class UnchangedFlow:
    """The text in the unchanged model; it passes through the layer when a statistic is asked for that nobody has left.

    Args:
        layer: computes with the weights of the source.
        unchanged: the unchanged model.
    """

    def __init__(self, layer: EditedLayer, unchanged: Unchanged) -> None:
        self._layer, self._unchanged = layer, unchanged
        self._hidden: HiddenStates | None = None
        self._half = 0

    def inputs(self, half: int) -> HalfInputs:
        """See `Flow`."""
        return HalfInputs(self._layer.block, partial(self._enter, half), archive=self._unchanged.stages)

    def settle(self, half: int) -> None:
        """See `Flow`."""

    def advance(self, half: int) -> None:
        """See `Flow`."""

    def leave(self) -> None:
        """See `Flow`."""
        if not self._unchanged.knows(self._layer.index):
            self._advance_to(2)
            self._unchanged.leave(self._layer.index)

    def _enter(self, half: int) -> Stream:
        return Stream(self._layer.modules.halves[half], self._advance_to(half))

    def _advance_to(self, half: int) -> HiddenStates:
        hidden = self._hidden = self._hidden or self._unchanged.enter(self._layer.index)
        for number in range(self._half, half):
            advance(Stream(self._layer.modules.halves[number], hidden))
        self._half = max(half, self._half)
        return hidden


class EditedFlow:
    """The text in the edited layer, and in the unchanged one beside it.

    Args:
        layer: being edited.
        changed: the hidden states that enter it; None for those of the unchanged model.
        unchanged: the unchanged model; needed where the layer is compared with it, or where `changed` is None.
        workspace: memory for the inputs of linears.
    """

    def __init__(
        self, layer: EditedLayer, changed: HiddenStates | None, unchanged: Unchanged | None, workspace: Workspace
    ) -> None:
        self._layer, self._unchanged, self._workspace = layer, unchanged, workspace
        if unchanged is not None and changed is None:
            unchanged.run_ahead(layer.index, layer.modules)
        self._before = unchanged.enter(layer.index) if unchanged is not None else None
        self._known = unchanged is not None and unchanged.knows(layer.index)
        entering = changed or self._before
        assert entering is not None, "text enters one of the two models"
        self._entering = entering
        self._settled: Stream | None = None
        self._original: Stream | None = None

    def inputs(self, half: int) -> HalfInputs:
        """See `Flow`."""
        return HalfInputs(self._layer.block, partial(self._enter, half), original=self._original)

    def settle(self, half: int) -> None:
        """See `Flow`."""
        self._settled = settle(self._enter(half), self._workspace)
        if self._layer.unchanged is not None and self._before is not None:
            stream = Stream(self._layer.unchanged.halves[half], self._before)
            self._original = record(stream, self._workspace)

    def advance(self, half: int) -> None:
        """See `Flow`."""
        advance(self._enter(half))
        if self._original is not None and (half == 0 or not self._known):
            advance(self._original)
        self._settled = self._original = None

    def leave(self) -> None:
        """See `Flow`."""
        if self._layer.unchanged is not None and self._unchanged is not None and not self._known:
            self._unchanged.leave(self._layer.index)

    def _enter(self, half: int) -> Stream:
        return self._settled or Stream(self._layer.modules.halves[half], self._entering)
