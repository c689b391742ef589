"""matrix.html and matrix.svg: the matrix as one page that needs no network, and its plot alone for README files."""

from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from quantlab.report.cells import Cell, cell, failures, notes
from quantlab.report.columns import Column, columns
from quantlab.report.coverage import SHARE_NAMES, heat_maps
from quantlab.report.matrix import Matrix
from quantlab.report.plot import SPEED_NAMES, Plot, lay_out
from quantlab.report.recommend import RULES, recommend
from quantlab.report.rows import Row

_HEADLINE = ("accuracy_loss_percent", "memory_percent_of_fp16", "speed_over_fp16")
_MAIN = (
    *_HEADLINE,
    "perplexity_change_percent",
    "kl_to_baseline",
    "top1_agreement",
    "artifact_bytes",
    "peak_memory_bytes",
    "load_seconds",
    "decode_tokens_per_second.1",
    "decode_tokens_per_second.8",
    "prefill_tokens_per_second.1",
)
_LONGEST_REASON = 120


@dataclass(frozen=True)
class Drawn:
    """A cell with the small graphic under its number; positions in percent of the cell's width."""

    cell: Cell
    bar: float | None = None
    """Length of a bar from the left."""
    zero: float | None = None
    """Where no loss lies; with `start`, `length` and `dot` a value and its interval."""
    start: float = 0.0
    length: float = 0.0
    dot: float = 0.0
    reason: str | None = None
    """Shown once per row and group."""


@dataclass(frozen=True)
class Line:
    """One row of a table."""

    row: Row
    is_baseline: bool
    picked_for: tuple[str, ...]
    """Goals it is recommended for."""
    cells: tuple[Drawn, ...]


@dataclass(frozen=True)
class Sheet:
    """One sortable table."""

    name: str
    caption: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]


def to_html(matrix: Matrix) -> str:
    """The text of matrix.html."""
    every = columns(matrix)
    main = tuple(column for key in _MAIN for column in every if column.key == key)
    rest = tuple(column for column in every if column.key not in _MAIN)
    wide, narrow = lay_out(matrix, width=900, height=440), lay_out(matrix, width=358, height=380)
    return (
        _environment()
        .get_template("matrix.html.j2")
        .render(
            matrix=matrix,
            recommendations=recommend(matrix),
            rules=RULES,
            sheets=(
                _sheet(matrix, "main", "Accuracy, memory and speed of every variant", main),
                _sheet(matrix, "rest", "All other numbers", rest),
            ),
            every=every,
            plots=tuple((name, plot) for name, plot in (("wide", wide), ("narrow", narrow)) if plot),
            speed_names=SPEED_NAMES,
            notes=notes(matrix),
            failures=failures(matrix),
            domains=tuple(matrix.rows[0].domains),
            tokens=sorted({row.perplexity.n for row in matrix.rows if row.perplexity}),
            versions=_versions(matrix),
            headline=_HEADLINE,
            heat_maps=heat_maps(matrix),
            share_names=SHARE_NAMES,
        )
    )


def to_svg(matrix: Matrix) -> str | None:
    """The text of matrix.svg, or None where there is nothing to draw."""
    plot = lay_out(matrix, width=760, height=420)
    return None if plot is None else _standalone(matrix, plot)


def _standalone(matrix: Matrix, plot: Plot) -> str:
    template = _environment().get_template("pareto.svg.j2")
    return template.render(matrix=matrix, plot=plot, name="wide", standalone=True, speed_names=SPEED_NAMES) + "\n"


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("quantlab.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )


def _sheet(matrix: Matrix, name: str, caption: str, shown: tuple[Column, ...]) -> Sheet:
    picked = {
        row.variant: tuple(found.goal for found in recommend(matrix) if found.variant == row.variant)
        for row in matrix.rows
    }
    by_column = [_drawn_column([cell(matrix, row, column) for row in matrix.rows], column) for column in shown]
    lines = []
    for index, row in enumerate(matrix.rows):
        told: set[str] = set()
        drawn = []
        for column, cells in zip(shown, by_column, strict=True):
            found = cells[index]
            if found.cell.state == "failed" and column.group not in told:
                told.add(column.group)
                found = Drawn(cell=found.cell, reason=_shortened(found.cell.reason or ""))
            drawn.append(found)
        lines.append(
            Line(
                row=row, is_baseline=row.variant == matrix.baseline, picked_for=picked[row.variant], cells=tuple(drawn)
            )
        )
    return Sheet(name=name, caption=caption, columns=shown, lines=tuple(lines))


def _drawn_column(cells: list[Cell], column: Column) -> list[Drawn]:
    """The cells of one column on their common scale; only the columns that decide are drawn."""
    if column.key not in _HEADLINE:
        return [Drawn(cell=found) for found in cells]
    ends = [end for found in cells for end in (found.number, found.low, found.high) if end is not None]
    least, most = min([0.0, *ends]), max([0.0, *ends])
    span = (most - least) or 1.0
    if column.key != "accuracy_loss_percent":
        return [
            Drawn(cell=found, bar=None if found.number is None else round(100 * found.number / span, 1))
            for found in cells
        ]
    return [_whisker(found, least=least, span=span) for found in cells]


def _whisker(found: Cell, *, least: float, span: float) -> Drawn:
    if found.number is None or found.low is None or found.high is None:
        return Drawn(cell=found)
    return Drawn(
        cell=found,
        zero=round(100 * -least / span, 1),
        start=round(100 * (found.low - least) / span, 1),
        length=round(100 * (found.high - found.low) / span, 1),
        dot=round(100 * (found.number - least) / span, 1),
    )


def _versions(matrix: Matrix) -> tuple[tuple[str, str], ...]:
    """Each package with its version; with all of them where rows differ."""
    names = sorted({name for row in matrix.rows for name in row.versions})
    return tuple(
        (name, " / ".join(sorted({row.versions[name] for row in matrix.rows if name in row.versions})))
        for name in names
    )


def _shortened(reason: str) -> str:
    return reason if len(reason) <= _LONGEST_REASON else reason[: _LONGEST_REASON - 1] + "…"
