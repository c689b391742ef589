"""The heat map of calibration tokens per routed expert and layer."""

from dataclasses import dataclass
from typing import Final

from quantlab.report.matrix.matrix import Matrix
from quantlab.report.matrix.rows import Row, link_to

SHARE_NAMES: Final = ("under a quarter of its share", "under half", "about its share", "from 1.5×", "from 3×")
SHARE_MARKS: Final = ("!", "−", "", "+", "*")
"""Marks in the squares, so that the classes differ by more than colour."""
_FROM: Final = (0.25, 0.5, 1.5, 3.0)
CELL: Final = 12


@dataclass(frozen=True)
class Square:
    """One expert of one layer: its position, its class in `SHARE_NAMES`, and its hover text."""

    x: int
    y: int
    share: int
    text: str

    @property
    def mark(self) -> str:
        return SHARE_MARKS[self.share]


@dataclass(frozen=True)
class HeatMap:
    """One variant's experts.

    Attributes:
        variant: its name.
        width, height: of the drawing in pixels.
        layers: name and y of every row, with a link to its numbers in the record.
        squares: the experts.
        sentence: the extremes in words.
    """

    variant: str
    width: int
    height: int
    layers: tuple[tuple[str, int, str | None], ...]
    squares: tuple[Square, ...]
    sentence: str


def heat_maps(matrix: Matrix) -> tuple[HeatMap, ...]:
    """One heat map per variant with counts of calibration tokens."""
    return tuple(_draw(row, row.record.tokens_per_expert) for row in matrix.rows if row.record.tokens_per_expert)


def _draw(row: Row, layers: dict[str, tuple[int, ...]]) -> HeatMap:
    squares, names = [], []
    fewest = min((count, expert, name) for name, counts in layers.items() for expert, count in enumerate(counts))
    for line, (name, counts) in enumerate(layers.items()):
        names.append((name.removeprefix("layer "), line * CELL, link_to(row, f"tokens_per_expert.{name}")))
        mean = sum(counts) / len(counts)
        for expert, count in enumerate(counts):
            ratio = count / mean if mean else 0.0
            share = sum(ratio >= edge for edge in _FROM)
            text = f"{name}, expert {expert}: {count:,} tokens, {ratio:.2f}× its share"
            squares.append(Square(expert * CELL, line * CELL, share, text))
    count, expert, name = fewest
    sentence = f"Fewest: {count:,} tokens for expert {expert} of {name}."
    width = CELL * max(map(len, layers.values()))
    return HeatMap(row.variant, width, CELL * len(layers), tuple(names), tuple(squares), sentence)
