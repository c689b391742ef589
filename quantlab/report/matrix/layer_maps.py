"""Heat maps by layer: the difference between variant and baseline per layer, as tables of numbers with a background colour.

Tasks with groups of items use the same kind of table.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, Literal

from quantlab.evaluation.measured import Measured
from quantlab.evaluation.record import MatrixErrors, TaskResult
from quantlab.report.matrix.matrix import Matrix
from quantlab.report.matrix.rows import Row, link_to, same_changes, same_layout, task_labels, task_of

TILE_WIDTH, TILE_HEIGHT, LETTER_WIDTH = 58, 24, 7
"""Sizes in the drawn map, in pixels."""
LEVELS: Final = 6
"""Classes of the background."""
_STANDS_OUT: Final = 3.0
"""A layer is named if its number exceeds the median of its row by this factor."""
_OUT_OF_SHAPE: Final = 1.5
"""A layer is also named if its error relative to similar rows exceeds that of the row's other layers by this factor."""
_FEWEST_LAYERS: Final = 3
_EVEN: Final = 1.5
"""Numbers within this factor of each other get the same background, because their order is not relevant."""

_SPAN: Final = 100.0
"""Numbers below the largest by this factor are one class, so that a variant without errors does not compress the scale."""


@dataclass(frozen=True)
class Tile:
    """One number; None where it was not measured."""

    text: str
    level: int | None
    details: str
    stands_out: bool = False
    href: str | None = None
    """Link to the number in its record."""


@dataclass(frozen=True)
class TileMap:
    """One heat map.

    Attributes:
        name: an identifier.
        caption: its caption.
        meaning: how to read it.
        corner: the kind of its rows.
        unit: the kind of its columns.
        heads: of the columns.
        lines: name of each row, with its tiles.
        sentences: the values that stand out, in words.
    """

    name: str
    caption: str
    meaning: str
    corner: str
    unit: str
    heads: tuple[str, ...]
    lines: tuple[tuple[str, tuple[Tile, ...]], ...]
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class LayerMeasure:
    """A number that records hold for each layer.

    Attributes:
        field: of the record's `quality.divergence`.
        name, caption, meaning: of its map; `{baseline}` stands for the baseline's name.
        subject: beginning of the sentence on a layer that stands out.
        badness: maps a value to its error, 0 for a perfect value.
        by_peers: a layer is also compared with the same layer of similar rows.
        csv_name: beginning of its names in matrix.csv.
    """

    field: Literal["layer_errors", "router_agreement"]
    name: str
    caption: str
    meaning: str
    subject: str
    badness: Callable[[float], float]
    by_peers: bool
    csv_name: str

    def of(self, row: Row) -> Mapping[str, Measured]:
        """The numbers of a row by layer; empty if they were not measured."""
        found: Mapping[str, Measured] = getattr(row.divergence, self.field, {})
        return found


LAYER_MEASURES: Final = (
    LayerMeasure(
        field="layer_errors",
        name="layer-errors",
        caption="Error of each layer",
        meaning="Error of what a layer adds to the hidden states, given {baseline}'s own hidden states: norm of the difference over "
        "norm of what the baseline's layer adds, in percent. Errors of earlier layers do not enter, so a layer at fault stands out.",
        subject="the error of",
        badness=lambda value: value,
        by_peers=True,
        csv_name="error_of",
    ),
    LayerMeasure(
        field="router_agreement",
        name="router-agreement",
        caption="Agreement of the routers",
        meaning="Percent of tokens that a layer's router sends to the same experts as in {baseline}.",
        subject="the agreement in",
        badness=lambda value: 1 - value,
        by_peers=False,
        csv_name="router_agreement_of",
    ),
)


def layer_maps(matrix: Matrix) -> tuple[TileMap, ...]:
    """The heat maps of layer errors and of the routers' agreement, with every variant that has them."""
    return tuple(found for measure in LAYER_MEASURES if (found := _map(matrix, measure)))


def _similar(row: Row, matrix: Matrix) -> tuple[str, ...]:
    """Other rows with the same passes and layout: their layers differ only in the chosen values."""
    return tuple(
        other.variant
        for other in matrix.rows
        if other is not row and same_layout(row, other) and same_changes(row, other)
    )


def matrix_maps(matrix: Matrix) -> tuple[TileMap, ...]:
    """For every variant, the errors of its matrices by kind and layer, from the artifact's manifest."""
    return tuple(_of_matrices(row, row.record.matrix_errors) for row in matrix.rows if row.record.matrix_errors)


def group_maps(matrix: Matrix) -> tuple[TileMap, ...]:
    """For every task with groups of items, such as context lengths, the score of each group."""
    tasks = {task.key: task for row in matrix.rows for task in row.tasks if task.by_group}
    labels = task_labels(task for row in matrix.rows for task in row.tasks)
    return tuple(_of_task(matrix, task, labels[key]) for key, task in tasks.items())


def _of_task(matrix: Matrix, task: TaskResult, label: str) -> TileMap:
    found = {row.variant: (row, one.by_group) for row in matrix.rows if (one := task_of(row, task.key))}
    groups = in_order({group for _, scores in found.values() for group in scores})
    worse = -1.0 if task.higher_is_better else 1.0
    levels = _levels([1 + worse * score.value for _, scores in found.values() for score in scores.values()])
    lines = []
    for variant, (row, scores) in found.items():
        tiles = [
            Tile("–", None, f"{variant}, {group}: not measured")
            if (score := scores.get(group)) is None
            else Tile(
                _percent(score.value),
                levels(1 + worse * score.value),
                f"{variant}, {group}: {_percent(score.value)} % ({_percent(score.low)} to {_percent(score.high)}), n = {score.n:,}",
                href=link_to(row, f"tasks.{label}.by_group.{group}"),
            )
            for group in groups
        ]
        lines.append((variant, tuple(tiles)))
    meaning = f"{task.metric.capitalize()} in percent, by group of items."
    return TileMap(f"task-{label}", f"{label} by group", meaning, "variant", "group", tuple(groups), tuple(lines), ())


def _map(matrix: Matrix, measure: LayerMeasure) -> TileMap | None:
    rows = {row.variant: row for row in matrix.rows}
    of_rows = {name: measure.of(row) for name, row in rows.items()}
    values: dict[str, Mapping[str, Measured]] = {name: found for name, found in of_rows.items() if found}
    if not values:
        return None
    badness = measure.badness
    layers = in_order({layer for row in values.values() for layer in row})
    level = _levels([badness(found.value) for row in values.values() for found in row.values()])
    lines, sentences = [], []
    for variant, row in values.items():
        usual = median(badness(found.value) for found in row.values())
        similar = [name for name in _similar(rows[variant], matrix) if name in values and measure.by_peers]
        misshapen = _out_of_shape(row, [values[name] for name in similar])
        tiles = []
        for layer in layers:
            found = row.get(layer)
            if found is None:
                tiles.append(Tile("–", None, f"{variant}, {layer}: not measured"))
                continue
            bad = badness(found.value)
            out = len(row) >= _FEWEST_LAYERS and bad > _STANDS_OUT * usual and level(bad) > 0
            text, ends = _percent(found.value), f"{_percent(found.low)} to {_percent(found.high)}"
            details = f"{variant}, {layer}: {text} % ({ends}), n = {found.n:,}"
            href = link_to(rows[variant], f"quality.divergence.{measure.field}.{layer}")
            tiles.append(Tile(text, level(bad), details, out or layer in misshapen, href))
            times = f", {bad / usual:.1f} times as far off as the median of its layers" if usual else ""
            if not out and layer in misshapen:
                here, elsewhere = misshapen[layer]
                times = f", {here:.1f} times that of {' and '.join(similar)} (same layout), {elsewhere:.1f} times in its other layers"
            if out or layer in misshapen:
                sentences.append(f"{variant}: {measure.subject} {layer} stands out, {text} %{times}.")
        lines.append((variant, tuple(tiles)))
    meaning = measure.meaning.format(baseline=matrix.baseline)
    return TileMap(
        measure.name, measure.caption, meaning, "variant", "layer", _heads(layers), tuple(lines), tuple(sentences)
    )


def _out_of_shape(
    row: Mapping[str, Measured], similar: Sequence[Mapping[str, Measured]]
) -> dict[str, tuple[float, float]]:
    """Layers whose error relative to similar rows is larger than that of the row's other layers, with both quotients.

    A variant may be worse than a similar one in all layers; a layer with a clearly larger quotient than the others is at fault.
    It is named only if the intervals do not overlap.
    """
    over: dict[str, tuple[float, float]] = {}
    for layer, found in row.items():
        others = [other[layer] for other in similar if layer in other]
        expected = median(other.value for other in others) if others else 0.0
        if expected > 0:
            over[layer] = found.value / expected, found.low / max(other.high for other in others)
    if len(over) < _FEWEST_LAYERS:
        return {}
    usual = median(quotient for quotient, _ in over.values())
    return {
        layer: (quotient, usual)
        for layer, (quotient, surely) in over.items()
        if quotient > _OUT_OF_SHAPE * usual and surely > usual
    }


def _of_matrices(row: Row, errors: Sequence[MatrixErrors]) -> TileMap:
    by_output = any(found.output_error is not None for found in errors)
    values = {(found.kind, found.layer): found for found in errors}
    layers = in_order({found.layer for found in errors})
    kinds = list(dict.fromkeys(found.kind for found in errors))
    level = _levels([_worst(found) for found in errors])
    lines = []
    for kind in kinds:
        found_by_layer = (values.get((kind, layer)) for layer in layers)
        lines.append((kind, tuple(_tile_of(row, found, level) for found in found_by_layer)))
    what = (
        "squared error of the outputs over squared outputs"
        if by_output
        else "norm of the change over norm of the weight"
    )
    meaning = f"The worst matrix of each kind: {what}, in percent, as it was when the artifact was made."
    return TileMap(
        f"matrices-{row.variant}",
        f"Matrices of {row.variant}",
        meaning,
        "kind",
        "layer",
        _heads(layers),
        tuple(lines),
        (),
    )


def _worst(found: MatrixErrors) -> float:
    return found.relative_error_max if found.output_error_max is None else found.output_error_max


def _tile_of(row: Row, found: MatrixErrors | None, level: Callable[[float], int]) -> Tile:
    if found is None:
        return Tile("–", None, "none was changed")
    details = (
        f"{found.layer}, {found.kind}: {found.count} matrices, error of the weights {_percent(found.relative_error)} %"
    )
    if found.output_error is not None:
        details += f", of their outputs {_percent(found.output_error)} % (medians)"
    if found.worst:
        details += f", worst {found.worst}"
    details += "".join(f", {count}: {what}" for what, count in found.fallbacks.items())
    href = link_to(row, f"matrix_errors.{found.layer}.{found.kind}")
    return Tile(_percent(_worst(found)), level(_worst(found)), details, href=href)


def _percent(value: float) -> str:
    scaled = 100 * value
    if 0 < scaled < 0.01:
        return "<0.01"
    return "0" if scaled == 0 else f"{scaled:.1f}" if scaled >= 0.995 else f"{scaled:.2g}"


def _levels(values: Iterable[float]) -> Callable[[float], int]:
    """A function that maps a value to its class: equal steps of its logarithm, over at most two decades below the largest value."""
    positive = [value for value in values if value > 0]
    if not positive or max(positive) <= _EVEN * min(positive):
        return lambda _: 0
    least, most = max(min(positive), max(positive) / _SPAN), max(positive)
    span = math.log(most / least)
    return lambda value: 0 if value <= least else min(LEVELS - 1, int(LEVELS * math.log(value / least) / span))


def in_order(layers: Iterable[str]) -> list[str]:
    """Layers sorted by number: "layer 10" comes after "layer 9"."""
    return sorted(layers, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def _heads(layers: Sequence[str]) -> tuple[str, ...]:
    return tuple(layer.removeprefix("layer ") for layer in layers)
