"""Heat maps by layer: where in the model a variant departs from the baseline, as tables of numbers with a background.

Tasks whose items fall into groups are drawn the same way.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from quantlab.evaluation.record import MatrixErrors, Measured, TaskResult
from quantlab.report.matrix import Matrix

LEVELS: Final = 6
"""Classes of the background."""
_STANDS_OUT: Final = 3.0
"""A layer with this many times the median of its row is named."""
_EVEN: Final = 1.5
"""Numbers within this factor of each other get one background: their order is no news."""

_SPAN: Final = 100.0
"""Below the largest by this factor all is one class: a variant without any error must not press the others together."""


@dataclass(frozen=True)
class Tile:
    """One number; None where it was not measured."""

    text: str
    level: int | None
    details: str
    stands_out: bool = False


@dataclass(frozen=True)
class TileMap:
    """One heat map.

    Attributes:
        name: an identifier.
        caption: what is shown.
        meaning: how to read it.
        corner: what the rows are.
        unit: what the columns are.
        heads: of the columns.
        lines: name of each row, with its tiles.
        sentences: what stands out, in words.
    """

    name: str
    caption: str
    meaning: str
    corner: str
    unit: str
    heads: tuple[str, ...]
    lines: tuple[tuple[str, tuple[Tile, ...]], ...]
    sentences: tuple[str, ...]


def layer_maps(matrix: Matrix) -> tuple[TileMap, ...]:
    """The error that each layer adds, and the router's agreement, of every variant that has them."""
    divergences = {row.variant: row.divergence for row in matrix.rows if row.divergence}
    errors = {variant: found.layer_errors for variant, found in divergences.items() if found.layer_errors}
    routers = {variant: found.router_agreement for variant, found in divergences.items() if found.router_agreement}
    maps = []
    if errors:
        maps.append(
            _map(
                "layer-errors",
                "Error of each layer",
                f"What a layer adds to the hidden states, given {matrix.baseline}'s own hidden states: norm of the difference over norm of "
                "what the baseline's layer adds, in percent. No error of earlier layers reaches it, so a layer at fault stands out.",
                errors,
                subject="the error of",
                badness=lambda value: value,
            )
        )
    if routers:
        maps.append(
            _map(
                "router-agreement",
                "Agreement of the routers",
                f"Percent of tokens that a layer's router sends to the same experts as in {matrix.baseline}.",
                routers,
                subject="the agreement in",
                badness=lambda value: 1 - value,
            )
        )
    return tuple(maps)


def matrix_maps(matrix: Matrix) -> tuple[TileMap, ...]:
    """For every variant, the error of its matrices by kind and layer, as the artifact's manifest tells it."""
    return tuple(_of_matrices(row.variant, row.matrix_errors) for row in matrix.rows if row.matrix_errors)


def group_maps(matrix: Matrix) -> tuple[TileMap, ...]:
    """For every task whose items fall into groups, such as lengths of the context, the score of each."""
    tasks = {task.name: task for row in matrix.rows for task in row.tasks if task.by_group}
    return tuple(_of_task(matrix, task) for task in tasks.values())


def _of_task(matrix: Matrix, task: TaskResult) -> TileMap:
    found = {row.variant: one.by_group for row in matrix.rows for one in row.tasks if one.name == task.name}
    groups = _in_order({group for scores in found.values() for group in scores})
    worse = -1.0 if task.higher_is_better else 1.0
    levels = _levels([1 + worse * score.value for scores in found.values() for score in scores.values()])
    lines = []
    for variant, scores in found.items():
        tiles = [
            Tile("–", None, f"{variant}, {group}: not measured")
            if (score := scores.get(group)) is None
            else Tile(
                _percent(score.value),
                levels(1 + worse * score.value),
                f"{variant}, {group}: {_percent(score.value)} % ({_percent(score.low)} to {_percent(score.high)}), n = {score.n:,}",
            )
            for group in groups
        ]
        lines.append((variant, tuple(tiles)))
    meaning = f"{task.metric.capitalize()} in percent, by group of items."
    return TileMap(
        f"task-{task.name}", f"{task.name} by group", meaning, "variant", "group", tuple(groups), tuple(lines), ()
    )


def _map(
    name: str,
    caption: str,
    meaning: str,
    values: Mapping[str, Mapping[str, Measured]],
    *,
    subject: str,
    badness: Callable[[float], float],
) -> TileMap:
    layers = _in_order({layer for row in values.values() for layer in row})
    level = _levels([badness(found.value) for row in values.values() for found in row.values()])
    lines, sentences = [], []
    for variant, row in values.items():
        usual = median(badness(found.value) for found in row.values())
        tiles = []
        for layer in layers:
            found = row.get(layer)
            if found is None:
                tiles.append(Tile("–", None, f"{variant}, {layer}: not measured"))
                continue
            bad = badness(found.value)
            out = len(row) > 2 and bad > _STANDS_OUT * usual and level(bad) > 0
            text, ends = _percent(found.value), f"{_percent(found.low)} to {_percent(found.high)}"
            tiles.append(Tile(text, level(bad), f"{variant}, {layer}: {text} % ({ends}), n = {found.n:,}", out))
            if out:
                times = f", {bad / usual:.1f} times as far off as the median of its layers" if usual else ""
                sentences.append(f"{variant}: {subject} {layer} stands out, {text} %{times}.")
        lines.append((variant, tuple(tiles)))
    return TileMap(name, caption, meaning, "variant", "layer", _heads(layers), tuple(lines), tuple(sentences))


def _of_matrices(variant: str, errors: Sequence[MatrixErrors]) -> TileMap:
    by_output = any(found.output_error is not None for found in errors)
    values = {(found.kind, found.layer): found for found in errors}
    layers = _in_order({found.layer for found in errors})
    kinds = list(dict.fromkeys(found.kind for found in errors))
    level = _levels([_worst(found) for found in errors])
    lines = []
    for kind in kinds:
        found_by_layer = (values.get((kind, layer)) for layer in layers)
        lines.append((kind, tuple(_tile_of(found, level) for found in found_by_layer)))
    what = (
        "squared error of the outputs over squared outputs"
        if by_output
        else "norm of the change over norm of the weight"
    )
    meaning = f"The worst matrix of each kind: {what}, in percent, as it was when the artifact was made."
    return TileMap(
        f"matrices-{variant}", f"Matrices of {variant}", meaning, "kind", "layer", _heads(layers), tuple(lines), ()
    )


def _worst(found: MatrixErrors) -> float:
    return found.relative_error_max if found.output_error_max is None else found.output_error_max


def _tile_of(found: MatrixErrors | None, level: Callable[[float], int]) -> Tile:
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
    return Tile(_percent(_worst(found)), level(_worst(found)), details)


def _percent(value: float) -> str:
    scaled = 100 * value
    if 0 < scaled < 0.01:
        return "<0.01"
    return "0" if scaled == 0 else f"{scaled:.1f}" if scaled >= 0.995 else f"{scaled:.2g}"


def _levels(values: Iterable[float]) -> Callable[[float], int]:
    """The class of a value: equal steps of its logarithm, up to the largest and over two decades at most."""
    positive = [value for value in values if value > 0]
    if not positive or max(positive) <= _EVEN * min(positive):
        return lambda _: 0
    least, most = max(min(positive), max(positive) / _SPAN), max(positive)
    span = math.log(most / least)
    return lambda value: 0 if value <= least else min(LEVELS - 1, int(LEVELS * math.log(value / least) / span))


def _in_order(layers: Iterable[str]) -> list[str]:
    """By their numbers, as "layer 10" comes after "layer 9"."""
    return sorted(layers, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def _heads(layers: Sequence[str]) -> tuple[str, ...]:
    return tuple(layer.removeprefix("layer ") for layer in layers)
