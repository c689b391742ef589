"""Prints a leaderboard in a terminal."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quantlab.report.leaderboard.files import ORDER, shown_columns
from quantlab.report.leaderboard.leaderboard import Leaderboard
from quantlab.report.matrix.table_cells import cell
from quantlab.report.matrix.terminal import in_encoding


def print_leaderboard(board: Leaderboard, console: Console) -> None:
    """Print the headline columns, best first."""
    matrix, shown = board.as_matrix(), shown_columns(board)
    console.print(Text(in_encoding(console, f"{board.suite} against {board.baseline}"), style="dim"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("rank", justify="right")
    table.add_column("variant", overflow="fold", style="bold")
    for column in shown:
        table.add_column(in_encoding(console, column.heading), justify="right", overflow="fold")
    table.add_column("verdict", overflow="fold")
    for place in (*board.places, *board.unranked):
        cells = [cell(matrix, place.row, column) for column in shown]
        texts = [f"{found.text} {found.margin or ''}{' noisy' if found.noise else ''}".strip() for found in cells]
        rank = place.rank if place in board.places else "–"
        words = (rank, place.row.variant, *texts, place.verdict or "–")
        table.add_row(*(Text(in_encoding(console, word)) for word in words))
    console.print(table)
    console.print(Text(in_encoding(console, ORDER), style="dim"))
