"""The matrix in a terminal: as many columns as fit, the four that decide first."""

import textwrap
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from quantlab.report.claims.table import ClaimsTable, claims_table
from quantlab.report.matrix.attention_table import AttentionTable, attention_table
from quantlab.report.matrix.columns import Column, columns
from quantlab.report.matrix.engine_table import HEADING, engine_table, has_verdicts, verdicts_of
from quantlab.report.matrix.layer_maps import layer_maps
from quantlab.report.matrix.matrix import Matrix
from quantlab.report.matrix.recommend import recommend
from quantlab.report.matrix.row_verdicts import summary
from quantlab.report.matrix.table_cells import TableCell, cell, failures, notes, served_warnings

_LABEL_WIDTH = 9
_LONGEST_LINE = 120
_IN_ASCII = str.maketrans({"±": "+-", "×": "x", "−": "-", "–": "-", "…": "...", "·": "-"})


def print_matrix(matrix: Matrix, console: Console) -> None:
    """Print the table, the recommendations and the notes."""
    console.print(Text(in_encoding(console, f"{matrix.recipe} · {matrix.suite} · {matrix.hardware}"), style="dim"))
    for table in tables_that_fit(matrix, console):
        console.print(table)
    attention = attention_table(matrix)
    if attention:
        console.print(_attention(attention, console))
        _print_labelled("note", attention.note, console, label_style="dim", style="dim")
    claims = claims_table(matrix)
    if claims:
        console.print(_claims(claims, console))
    unharmed = [
        row.variant for row in matrix.rows if row.variant != matrix.baseline and summary(row) == "no measurable loss"
    ]
    if unharmed:
        _print_labelled("no loss", f"No measurable loss: {', '.join(unharmed)}.", console, label_style="bold green")
    for found in recommend(matrix):
        _print_labelled(
            found.goal, found.sentence, console, label_style="bold green" if found.variant else "bold yellow"
        )
    for sentence in (sentence for found in layer_maps(matrix) for sentence in found.sentences):
        _print_labelled("layers", sentence, console, label_style="bold red")
    verdicts = engine_table(matrix)
    for line in verdicts.lines if verdicts else ():
        if line.mood != "good":
            text = f"{line.variant}: {line.engine} {line.verdict}: {line.reason}"
            style = "bold red" if line.mood == "bad" else "bold yellow"
            _print_labelled("engine", text, console, label_style=style)
    for warning in served_warnings(matrix):
        _print_labelled("served", warning, console, label_style="bold red")
    for failure in failures(matrix):
        _print_labelled("failed", failure, console, label_style="bold red")
    for note in (
        "± is the wider side of the 95 % interval; a range is the smallest and the largest value found; bold marks a measurable change.",
        *notes(matrix),
    ):
        _print_labelled("note", note, console, label_style="dim", style="dim")


def tables_that_fit(matrix: Matrix, console: Console) -> list[Table]:
    """The matrix with as many detail columns as fit the console's width; headline columns are always included.

    The losses of tasks are in the same table if all of them fit, else in separate tables.
    """
    every = columns(matrix)
    fitting = [column for column in every if column.is_headline]
    details = [column for column in every if column.is_in("main") and not column.is_headline]
    for detail in sorted(details, key=lambda column: column.metric.rank):
        if _fits(_table(matrix, [*fitting, detail], console), console):
            fitting.append(detail)
    tasks = [column for column in every if column.task is not None and column.relative]
    joined = _table(matrix, [*fitting, *tasks], console)
    if not tasks or _fits(joined, console):
        return [joined]
    apart: list[list[Column]] = [[]]
    for task in tasks:
        if apart[-1] and not _fits(_table(matrix, [*apart[-1], task], console), console):
            apart.append([])
        apart[-1].append(task)
    return [_table(matrix, shown, console) for shown in (fitting, *apart)]


def _fits(table: Table, console: Console) -> bool:
    """Whether the table fits without wrapping a cell."""
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width


def _table(matrix: Matrix, shown: Sequence[Column], console: Console) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="bold", show_edge=False)
    table.add_column("\nvariant", overflow="fold", style="bold", ratio=None)
    for column in shown:
        table.add_column(
            in_encoding(console, column.metric.head),
            justify="right",
            no_wrap=True,
            style=None if column.is_headline else "dim",
        )
    engines = has_verdicts(matrix) and any(column.is_headline for column in shown)
    if engines:
        table.add_column(f"\n{HEADING}", overflow="fold")
    for row in matrix.rows:
        cells = [_text(cell(matrix, row, column), column, console) for column in shown]
        cells += [Text(in_encoding(console, verdicts_of(row) or "–"))] * engines
        table.add_row(Text(row.variant, style="italic" if row.variant == matrix.baseline else ""), *cells)
    return table


def _attention(found: AttentionTable, console: Console) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="bold", show_edge=False)
    table.add_column(found.heads[0], overflow="fold", style="bold")
    for head in found.heads[1:]:
        table.add_column(in_encoding(console, head), justify="right", overflow="fold")
    for line in found.lines:
        cells = (line.reason, *("–" for _ in line.cells[1:])) if line.reason else line.cells
        table.add_row(line.implementation, line.context, *(in_encoding(console, text) for text in cells))
    return table


def _claims(claims: ClaimsTable, console: Console) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="bold", show_edge=False)
    for head in claims.heads[:4]:
        table.add_column(head, overflow="fold")
    for line in claims.lines:
        texts = [Text(in_encoding(console, text)) for text in (line.text, line.claimed, line.measured, line.verdict)]
        texts[-1].stylize({"good": "green", "bad": "red"}.get(line.mood, "yellow"))
        table.add_row(*texts)
    return table


def _text(found: TableCell, column: Column, console: Console) -> Text:
    match found.state:
        case "baseline":
            return Text(in_encoding(console, found.text), style="italic dim")
        case "failed":
            return Text(found.text, style="red")
        case "missing":
            return Text(in_encoding(console, found.text), style="dim")
        case "value":
            text = Text(in_encoding(console, found.text))
            if found.verdict in ("loss", "gain"):
                text.stylize("bold")
            if found.margin and (column.is_headline or column.metric.loss):
                text.append(" " + in_encoding(console, found.margin), style="dim not bold")
            if found.noise:
                text.append(" noisy", style="yellow not bold")
            return text


def _print_labelled(label: str, text: str, console: Console, *, label_style: str, style: str = "") -> None:
    """Print a paragraph beside its label; wrapped lines are indented to the text."""
    width = max(_LABEL_WIDTH + 20, min(console.width, _LONGEST_LINE))
    lines = textwrap.wrap(in_encoding(console, text), width - _LABEL_WIDTH, break_on_hyphens=False)
    for index, line in enumerate(lines):
        console.print(
            Text.assemble(((label if index == 0 else "").ljust(_LABEL_WIDTH), label_style), (line, style)),
            soft_wrap=True,
        )


def in_encoding(console: Console, text: str) -> str:
    """The text with characters replaced that the console's encoding cannot represent."""
    return text if console.encoding.lower().startswith("utf") else text.translate(_IN_ASCII)
