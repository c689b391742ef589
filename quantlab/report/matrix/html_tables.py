"""The tables of a page: every cell with its link, its hover text and the small graphic below the number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from quantlab.report.matrix.columns import Column
from quantlab.report.matrix.engine_table import HEADING, has_verdicts, verdicts_of
from quantlab.report.matrix.matrix import Matrix
from quantlab.report.matrix.row_verdicts import summary, verdicts
from quantlab.report.matrix.rows import METRICS, Row, link_to, noise_of
from quantlab.report.matrix.table_cells import TableCell, cell, counts, details

_LONGEST_REASON = 120


@dataclass(frozen=True)
class HtmlCell:
    """A table cell with a small graphic below its number; positions are in percent of the cell's width."""

    cell: TableCell
    tip: str = ""
    """Hover text: the number with interval, n, verdict, p and origin."""
    href: str | None = None
    """Link to the number in its record."""
    bar: float | None = None
    """Length of a bar from the left."""
    zero: float | None = None
    """Position of zero loss; `start`, `length` and `dot` are the interval's start and length and the value."""
    start: float = 0.0
    length: float = 0.0
    dot: float = 0.0
    reason: str | None = None
    """Shown once per row and group."""


@dataclass(frozen=True)
class HtmlRow:
    """One row of a table."""

    row: Row
    is_baseline: bool
    href: str | None
    """Link to the row's record."""
    picked_for: tuple[str, ...]
    """Goals it is recommended for."""
    rank: str
    summary: str | None
    """Its verdicts in a few words."""
    lost: bool
    filters: dict[str, str]
    """Values for the page's filter; only in the main table."""
    cells: tuple[HtmlCell, ...]
    engines: str = ""
    """Verdicts of other engines; only in the main table."""


@dataclass(frozen=True)
class HtmlTable:
    """One sortable table."""

    name: str
    caption: str
    corner: str
    columns: tuple[Column, ...]
    counts: tuple[str, ...]
    """n of each column."""
    lines: tuple[HtmlRow, ...]
    main: bool
    engines: str = ""
    """Head of the column of verdicts of other engines; empty without one."""


def make_html_table(
    matrix: Matrix,
    name: str,
    caption: str,
    shown: Sequence[Column],
    *,
    picked: Mapping[str, tuple[str, ...]] | None = None,
    ranks: Mapping[str, str] | None = None,
) -> HtmlTable:
    """The table of some columns.

    Args:
        matrix: the rows.
        name: an identifier; "main" is the table that the page's filter uses.
        caption: its caption.
        shown: its columns.
        picked: the goals that a variant is recommended for.
        ranks: the rank of each variant, shown before its name.
    """
    by_column = [_drawn_column(matrix, column) for column in shown]
    lines = []
    for index, row in enumerate(matrix.rows):
        summarised = summary(row)
        lines.append(
            HtmlRow(
                row=row,
                is_baseline=row.variant == matrix.baseline,
                href=link_to(row),
                picked_for=(picked or {}).get(row.variant, ()),
                rank=(ranks or {}).get(row.variant, ""),
                summary=summarised,
                lost="loss" in verdicts(row).values(),
                filters=_filters(matrix, row) if name == "main" else {},
                cells=tuple(_with_reasons([drawn[index] for drawn in by_column], shown)),
                engines=verdicts_of(row) if name == "main" else "",
            )
        )
    return HtmlTable(
        name,
        caption,
        "variant",
        tuple(shown),
        tuple(counts(matrix, column) for column in shown),
        tuple(lines),
        main=name == "main",
        engines=HEADING if name == "main" and has_verdicts(matrix) else "",
    )


def _filters(matrix: Matrix, row: Row) -> dict[str, str]:
    """Values of a row for the filter; empty if a number was not measured."""
    changes = [row.measured(name) for name, (_, declared) in METRICS.items() if declared.metric.loss]
    losses = [found.high for found in changes if found is not None]
    is_baseline = row.variant == matrix.baseline
    found = verdicts(row)
    lost = "" if not found else "yes" if "loss" in found.values() else "no"
    speed = None if noise_of(row, "speed_over_fp16") else row.measured("speed_over_fp16")
    memory = row.number("memory_percent_of_fp16")
    return {
        "find": f"{row.variant} {row.description}",
        "lost": "no" if is_baseline else lost,
        "loss": "0" if is_baseline else str(max(losses)) if losses else "",
        "memory": "" if memory is None else f"{memory:.2f}",
        "speed": "" if speed is None else f"{speed.value:.3f}",
    }


def _with_reasons(drawn: Sequence[HtmlCell], shown: Sequence[Column]) -> list[HtmlCell]:
    """Show the reason of a failure only in the first cell of its group."""
    shown_groups: set[str] = set()
    result = []
    for column, found in zip(shown, drawn, strict=True):
        if found.cell.state == "failed" and column.group not in shown_groups:
            shown_groups.add(column.group)
            result.append(HtmlCell(cell=found.cell, tip=found.tip, reason=_shortened(found.cell.reason or "")))
        else:
            result.append(found)
    return result


def _drawn_column(matrix: Matrix, column: Column) -> list[HtmlCell]:
    """The cells of one column with a common scale; only headline columns have graphics."""
    cells = [cell(matrix, row, column) for row in matrix.rows]
    ends = [end for found in cells for end in (found.number, found.low, found.high) if end is not None]
    least, most = min([0.0, *ends]), max([0.0, *ends])
    span = (most - least) or 1.0
    drawn = []
    for row, found in zip(matrix.rows, cells, strict=True):
        plain = HtmlCell(cell=found, tip=details(row, column, found), href=link_to(row, column.field))
        drawn.append(_with_graphic(plain, column, least=least, span=span))
    return drawn


def _with_graphic(drawn: HtmlCell, column: Column, *, least: float, span: float) -> HtmlCell:
    found = drawn.cell
    if not column.is_headline or found.number is None:
        return drawn
    if column.metric.loss is None:
        return replace(drawn, bar=round(100 * found.number / span, 1))
    if found.low is None or found.high is None:
        return drawn
    return replace(
        drawn,
        zero=round(100 * -least / span, 1),
        start=round(100 * (found.low - least) / span, 1),
        length=round(100 * (found.high - found.low) / span, 1),
        dot=round(100 * (found.number - least) / span, 1),
    )


def _shortened(reason: str) -> str:
    return reason if len(reason) <= _LONGEST_REASON else reason[: _LONGEST_REASON - 1] + "…"
