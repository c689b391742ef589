"""Layout of the bar charts of speed by batch size: geometry only, which a template draws as SVG.

There is one panel per phase and batch size. All panels have the same scale, so that a variant can be compared across batch sizes.
Coordinates are SVG pixels with y pointing down.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from quantlab.evaluation.measured import Measured
from quantlab.evaluation.speed.metrics import timed_words
from quantlab.report.matrix.matrix import Matrix
from quantlab.report.matrix.rows import Row, in_size, link_to, noise_of
from quantlab.report.matrix.scatter_plot import Tick, nice_ticks
from quantlab.report.matrix.table_cells import interval, number

WIDTH = 360.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 118.0, 74.0, 8.0, 24.0
_STEP, _THICK = 24.0, 13.0


@dataclass(frozen=True)
class Bar:
    """One variant.

    Attributes:
        y, middle: top of the bar and its middle.
        length: pixels from the axis.
        low, high: x of the ends of the interval.
        text: text beside the bar.
        noise: reason why the measurement is noisy.
        details: all its numbers in one line.
        href: link to the number in its record.
    """

    variant: str
    y: float
    middle: float
    length: float
    low: float
    high: float
    text: str
    noise: str | None
    is_baseline: bool
    details: str
    href: str | None


@dataclass(frozen=True)
class Panel:
    """One phase at one batch size."""

    key: str
    title: str
    timed: str
    """The model that was timed."""
    height: float
    left: float
    bottom: float
    thick: float
    one: float
    """x of FP16's speed."""
    ticks: tuple[Tick, ...]
    bars: tuple[Bar, ...]
    sentence: str


def lay_out_bars(matrix: Matrix) -> tuple[Panel, ...]:
    """One panel for every phase and batch size for which any row has a ratio to FP16."""
    kinds = [
        (phase, batch)
        for phase in ("decode", "prefill")
        for batch in in_size({batch for row in matrix.rows for batch in row.by_batch(f"{phase}_over_fp16")})
    ]
    timed = {kind: [(row, ratio) for row in matrix.rows if (ratio := _ratio(row, *kind))] for kind in kinds}
    shown = {kind: found for kind, found in timed.items() if found}
    if not shown:
        return ()
    most = max(1.0, *(ratio.high for found in shown.values() for _, ratio in found))
    return tuple(_panel(matrix, phase, batch, found, most) for (phase, batch), found in shown.items())


def _ratio(row: Row, phase: str, batch: str) -> Measured | None:
    return row.by_batch(f"{phase}_over_fp16").get(batch)


def _panel(matrix: Matrix, phase: str, batch: str, timed: Sequence[tuple[Row, Measured]], most: float) -> Panel:
    scale = (WIDTH - _LEFT - _RIGHT) / most

    def x(value: float) -> float:
        return round(_LEFT + scale * value, 1)

    bars = []
    for index, (row, ratio) in enumerate(timed):
        noise = noise_of(row, f"{phase}_over_fp16.{batch}")
        y = _TOP + index * _STEP
        bars.append(
            Bar(
                variant=row.variant,
                y=y,
                middle=y + _THICK / 2,
                length=round(scale * ratio.value, 1),
                low=x(ratio.low),
                high=x(ratio.high),
                text=f"{number(ratio.value, 'ratio')}×" + (" noisy" if noise else ""),
                noise=noise,
                is_baseline=row.variant == matrix.baseline,
                details=_details(row, ratio, phase=phase, batch=batch, noise=noise),
                href=link_to(row, f"speed.{phase}_over_fp16.{batch}"),
            )
        )
    bottom = _TOP + len(bars) * _STEP
    fastest = max(timed, key=lambda pair: pair[1].value)
    return Panel(
        key=f"{phase}-{batch}",
        title=f"{phase} at batch {batch}",
        timed=timed_words(row.speed.timed for row in matrix.rows if row.speed).head,
        height=bottom + _BOTTOM,
        left=_LEFT,
        bottom=bottom,
        thick=_THICK,
        one=x(1.0),
        ticks=tuple(Tick(x(value), f"{value:g}×") for value in nice_ticks(0.0, most, at_most=5)),
        bars=tuple(bars),
        sentence=f"Largest: {fastest[0].variant}, {number(fastest[1].value, 'ratio')}× FP16.",
    )


def _details(row: Row, ratio: Measured, *, phase: str, batch: str, noise: str | None) -> str:
    rate = row.by_batch(f"{phase}_tokens_per_second").get(batch)
    parts = [f"{row.variant}: {number(ratio.value, 'ratio')}× FP16 ({interval(ratio, 'ratio')})"]
    if rate is not None:
        parts.append(f"{number(rate.value, 'rate')} tokens/s ({interval(rate, 'rate')})")
    if noise:
        parts.append(f"noisy: {noise}")
    return ", ".join(parts)
