"""Prints a comparison in a terminal."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quantlab.evaluation.measured import Measured
from quantlab.evaluation.metric import Unit
from quantlab.report.comparison.compare import Comparison, Number, Pair
from quantlab.report.matrix.table_cells import interval, number
from quantlab.report.matrix.terminal import in_encoding

_STYLES = {"A is better": "bold", "B is better": "bold", "not comparable": "yellow", "not judged": "yellow"}
NOTE = (
    "Numbers are shown with their 95 % intervals. B − A of quality and tasks is paired over the same documents; if the records lack "
    "their scores, or the number is not a sum over them, it is unpaired and has no verdict. B − A of times treats both as "
    "independent. A difference is measurable if its interval excludes zero."
)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print every pair: warnings, differing properties and numbers."""
    for pair in comparison.pairs:
        _print_pair(pair, console)
    for side, missing in (("A", comparison.only_in_a), ("B", comparison.only_in_b)):
        if missing:
            _say(console, f"only in {side}: {', '.join(missing)}", "yellow")
    _say(console, NOTE, "dim")


def _print_pair(pair: Pair, console: Console) -> None:
    _say(console, f"A  {pair.variant_a}  {pair.a}", "bold")
    _say(console, f"B  {pair.variant_b}  {pair.b}", "bold")
    for warning in pair.warnings:
        _say(console, f"warning: {warning}", "bold yellow")
    if pair.differences:
        console.print(_differences(pair, console))
    else:
        _say(console, "Nothing about the two differs but the numbers.", "dim")
    console.print(_numbers(pair, console))
    console.print()


def _differences(pair: Pair, console: Console) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for head in ("what differs", "A", "B"):
        table.add_column(head, overflow="fold")
    for found in pair.differences:
        table.add_row(*(Text(in_encoding(console, text)) for text in (found.what, found.a, found.b)))
    return table


def _numbers(pair: Pair, console: Console) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("number", overflow="fold")
    for head in ("A", "B", "B − A"):
        table.add_column(in_encoding(console, head), justify="right", overflow="fold")
    table.add_column("", overflow="fold")
    for found in pair.numbers:
        said = found.verdict + (f": {found.reason}" if found.reason else "")
        cells = (found.heading, *(text_of(found, value) for value in (found.a, found.b, found.difference)), said)
        texts = [Text(in_encoding(console, text)) for text in cells]
        texts[-1].stylize(_STYLES.get(found.verdict, "dim"))
        table.add_row(*texts)
    return table


def text_of(found: Number, value: Measured | float | None) -> str:
    """A number with its interval; exact numbers have no interval."""
    unit: Unit = found.unit
    if value is None:
        return "–"
    if not isinstance(value, Measured):
        return number(value, unit)
    if value.low == value.high:
        return number(value.value, unit)
    return f"{number(value.value, unit)} ({interval(value, unit)})"


def _say(console: Console, text: str, style: str) -> None:
    console.print(Text(in_encoding(console, text), style=style), soft_wrap=True)
