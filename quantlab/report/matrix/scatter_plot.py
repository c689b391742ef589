"""Layout of the scatter plot of accuracy loss against memory: geometry only, which a template draws as SVG.

No plotting library is used, so that the plot follows the reader's colour theme, a screen reader can read every point, and the
output is equal in every byte on every machine. Coordinates are SVG pixels with y pointing down.

Points of equal memory are common (two INT4 variants, all 16-bit variants), so overlapping marks are shifted sideways, and labels
are placed in free space around their mark.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from quantlab.evaluation.measured import Measured
from quantlab.report.matrix.matrix import Matrix
from quantlab.report.matrix.rows import Row, noise_of
from quantlab.report.matrix.table_cells import interval, number

SPEED_STEPS = (0.95, 1.25, 2.0, 3.0)
"""Lower bounds of the classes of speed over FP16, except the slowest."""
SPEED_NAMES = ("slower than FP16", "as fast", "from 1.25×", "from 2×", "from 3×")
_RADII = (5.0, 6.0, 7.5, 9.0, 10.5)
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 22.0, 34.0, 46.0
_LETTER, _LINE = 7.6, 15.0
_SHIFTS = (0, -6, 6, -10, 10, -14, 14)
_OFF_SCALE = 5.0
"""A loss more than this many times the next smaller one is drawn off the scale; it would compress all others onto the axis."""


@dataclass(frozen=True)
class Box:
    """A rectangle that other elements should not overlap."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "Box") -> float:
        """Shared area in square pixels."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


@dataclass(frozen=True)
class Tick:
    position: float
    text: str


@dataclass(frozen=True)
class Mark:
    """One variant."""

    variant: str
    x: float
    """Drawn position, shifted by a few pixels if marks would overlap."""
    true_x: float
    y: float
    radius: float
    bar_top: float
    bar_bottom: float
    speed_class: int | None
    is_baseline: bool
    on_frontier: bool
    noise: str | None
    """Reason why the measurement of its speed is noisy."""
    details: str
    """All numbers of the point in one line."""

    def covers(self, other: "Mark") -> float:
        """How much two marks overlap: dots may touch, bars must not."""
        dots = _square(self, 0.7 * self.radius).overlap(_square(other, 0.7 * other.radius))
        return dots + _bar(self, 2.5).overlap(_bar(other, 2.5))


@dataclass(frozen=True)
class Label:
    text: str
    x: float
    y: float
    """Baseline of the text."""
    box: Box
    leader: tuple[float, float, float, float] | None
    """Line from the mark to a distant text."""


@dataclass(frozen=True)
class Plot:
    """The whole plot."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    zero: float
    """y of no loss."""
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    frontier: str
    """Path through the Pareto frontier: rows that no other row beats in both numbers."""
    marks: tuple[Mark, ...]
    labels: tuple[Label, ...]
    left_out: tuple[str, ...]
    """Rows that are not drawn, with the reason."""


@dataclass(frozen=True)
class _Point:
    row: Row
    memory: float
    loss: Measured
    is_baseline: bool


def lay_out(matrix: Matrix, *, width: float, height: float) -> Plot | None:
    """Lay out the plot at a size in pixels; None if no variant has both numbers."""
    points, left_out = _points(matrix)
    if all(point.is_baseline for point in points):
        return None
    most = max(100.0, *(point.memory for point in points))
    low, high = min(0.0, *(point.loss.low for point in points)), max(0.0, *(point.loss.high for point in points))
    if low == high:
        high = 1.0
    y_values = nice_ticks(low, high, at_most=6)
    x_values = nice_ticks(0.0, most, at_most=6 if width > 500 else 5)
    left, right, top, bottom = _LEFT, width - _RIGHT, _TOP, height - _BOTTOM
    y_low, y_high = min(low, y_values[0]), max(high, y_values[-1])
    margin = 0.06 * (y_high - y_low)
    x_most = 1.06 * max(most, x_values[-1])

    def x_of(memory: float) -> float:
        return left + (right - left) * memory / x_most

    def y_of(loss: float) -> float:
        return bottom - (bottom - top) * (loss - (y_low - margin)) / (y_high - y_low + 2 * margin)

    best = _frontier(points)
    marks = _marks(points, best, x_of=x_of, y_of=y_of)
    return Plot(
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        zero=round(y_of(0.0), 1),
        x_ticks=tuple(Tick(round(x_of(value), 1), f"{value:g}") for value in x_values),
        y_ticks=tuple(Tick(round(y_of(value), 1), number_of_tick(value)) for value in y_values),
        frontier=_steps([mark for mark in marks if mark.on_frontier]),
        marks=tuple(marks),
        labels=tuple(_labels(marks, within=Box(left + 2, top - 18, width - 2, bottom - 3))),
        left_out=tuple(left_out),
    )


def nice_ticks(low: float, high: float, *, at_most: int) -> list[float]:
    """Round tick values that cover `low` to `high`."""
    rough = (high - low) / (at_most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 10) + 0.0 for index in range(first, last + 1)]


def number_of_tick(value: float) -> str:
    """A tick's number with a minus sign."""
    return f"{value:g}".replace("-", "−")


def _points(matrix: Matrix) -> tuple[list[_Point], list[str]]:
    points, left_out = [], []
    for row in matrix.rows:
        is_baseline = row.variant == matrix.baseline
        loss = Measured(value=0.0, low=0.0, high=0.0, n=0) if is_baseline else row.measured("accuracy_loss_percent")
        memory = row.number("memory_percent_of_fp16")
        if loss is None or memory is None:
            left_out.append(f"{row.variant}: {'accuracy loss' if loss is None else 'memory'} not measured")
        else:
            points.append(_Point(row=row, memory=memory, loss=loss, is_baseline=is_baseline))
    by_loss = sorted((point for point in points if not point.is_baseline), key=lambda point: point.loss.value)
    while len(by_loss) > 1 and by_loss[-1].loss.value > _OFF_SCALE * max(by_loss[-2].loss.high, 1.0):
        beyond = by_loss.pop()
        points.remove(beyond)
        left_out.append(
            f"{beyond.row.variant}: off the scale, accuracy loss {number(beyond.loss.value, 'change')} % at {number(beyond.memory, 'percent')} % of memory"
        )
    return points, left_out


def _frontier(points: Sequence[_Point]) -> set[str]:
    """Variants that no other variant beats in both numbers (by their values, not their intervals)."""
    best: set[str] = set()
    lowest = math.inf
    for point in sorted(points, key=lambda point: (point.memory, point.loss.value)):
        if point.loss.value < lowest:
            lowest = point.loss.value
            best.add(point.row.variant)
    return best


def _marks(
    points: Sequence[_Point], best: set[str], *, x_of: Callable[[float], float], y_of: Callable[[float], float]
) -> list[Mark]:
    marks: list[Mark] = []
    for point in points:
        speed = point.row.measured("speed_over_fp16")
        speed_class = None if speed is None else sum(speed.value >= step for step in SPEED_STEPS)
        shifted = [
            Mark(
                variant=point.row.variant,
                x=round(x_of(point.memory) + shift, 1),
                true_x=round(x_of(point.memory), 1),
                y=round(y_of(point.loss.value), 1),
                radius=_RADII[1] if speed_class is None else _RADII[speed_class],
                bar_top=round(y_of(point.loss.high), 1),
                bar_bottom=round(y_of(point.loss.low), 1),
                speed_class=speed_class,
                is_baseline=point.is_baseline,
                on_frontier=point.row.variant in best,
                noise=noise_of(point.row, "speed_over_fp16"),
                details=_details(point),
            )
            for shift in _SHIFTS
        ]
        marks.append(min(shifted, key=lambda mark: sum(mark.covers(other) for other in marks)))
    return marks


def _details(point: _Point) -> str:
    loss = (
        "the baseline"
        if point.is_baseline
        else f"accuracy loss {number(point.loss.value, 'change')} % ({interval(point.loss, 'change')})"
    )
    speed = point.row.measured("speed_over_fp16")
    pace = f"speed {number(speed.value, 'ratio')}× FP16 ({interval(speed, 'ratio')})" if speed else "speed not measured"
    noise = noise_of(point.row, "speed_over_fp16")
    pace += f", noisy: {noise}" if noise else ""
    return f"{point.row.variant}: {loss}, memory {number(point.memory, 'percent')} % of FP16, {pace}"


def _steps(marks: Sequence[Mark]) -> str:
    """A staircase through the frontier; the variants lie on it, above it or to its right."""
    ordered = sorted(marks, key=lambda mark: mark.true_x)
    path = f"M{ordered[0].true_x:g} {ordered[0].y:g}" if len(ordered) > 1 else ""
    return path + "".join(f"H{mark.true_x:g}V{mark.y:g}" for mark in ordered[1:])


def _labels(marks: Sequence[Mark], *, within: Box) -> Iterator[Label]:
    taken = [box for mark in marks for box in _obstacles(mark)]
    for mark in marks:
        width = _LETTER * len(mark.variant)
        places = list(_places(mark, width))
        costs = [sum(label.box.overlap(box) for box in taken) + 10 * _outside(label.box, within) for label in places]
        chosen = places[min(range(len(places)), key=lambda index: (round(costs[index], 3), index))]
        box = chosen.box  # two adjacent names would read as one
        taken.append(Box(box.left - _LETTER, box.top, box.right + _LETTER, box.bottom))
        yield chosen


def _obstacles(mark: Mark) -> tuple[Box, Box]:
    return _square(mark, mark.radius + 2), _bar(mark, 5)


def _square(mark: Mark, half: float) -> Box:
    return Box(mark.x - half, mark.y - half, mark.x + half, mark.y + half)


def _bar(mark: Mark, half: float) -> Box:
    return Box(mark.x - half, mark.bar_top - 1, mark.x + half, mark.bar_bottom + 1)


def _outside(box: Box, within: Box) -> float:
    """Pixels by which a box exceeds the plot."""
    return (
        max(0.0, within.left - box.left)
        + max(0.0, box.right - within.right)
        + max(0.0, within.top - box.top)
        + max(0.0, box.bottom - within.bottom)
    )


def _places(mark: Mark, width: float) -> Iterator[Label]:
    """Candidate positions of a label, best first: beside the mark, above and below it, then further away with a leader line."""
    for distance in (4.0, 14.0, 26.0, 40.0, 56.0):
        reach = mark.radius + distance
        for horizontal, vertical in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)):
            middle = mark.x + horizontal * (reach if not vertical else 0.7 * reach + 4)
            left = middle - width / 2 if not horizontal else middle if horizontal > 0 else middle - width
            center = mark.y + vertical * (reach + _LINE / 2 if not horizontal else 0.7 * reach + _LINE / 2)
            box = Box(left, center - _LINE / 2, left + width, center + _LINE / 2)
            leader = None
            if distance > 4:
                end_x = min(max(mark.x, box.left), box.right)
                end_y = min(max(mark.y, box.top), box.bottom)
                leader = (mark.x, mark.y, round(end_x, 1), round(end_y, 1))
            yield Label(text=mark.variant, x=round(left, 1), y=round(center + 4, 1), box=box, leader=leader)
