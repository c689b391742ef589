"""leaderboard.html, .md, .csv and .json from the directories of runs."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from quantlab.evaluation.record import Record
from quantlab.report.files import find_records, write_texts
from quantlab.report.leaderboard.leaderboard import NAME, Leaderboard, Place, build_leaderboard
from quantlab.report.matrix.columns import Column, columns
from quantlab.report.matrix.csv_file import to_csv
from quantlab.report.matrix.html import environment, main_and_rest, plots, versions
from quantlab.report.matrix.html_tables import make_html_table
from quantlab.report.matrix.markdown import cell_text, code, escaped, table_line
from quantlab.report.matrix.rows import link_to
from quantlab.report.matrix.scatter_plot import SPEED_NAMES
from quantlab.report.matrix.table_cells import cell, notes

ORDER = (
    "Ranked by KL to the baseline, which responds to every change of a prediction, while accuracy responds only to predictions that "
    "become right or wrong. A rank such as 2–4 means that the intervals, paired where the records allow it, leave the order open: "
    "the row is surely behind one other and surely ahead of all after the fourth."
)


def write_leaderboard(directories: Sequence[Path], out: Path) -> Leaderboard:
    """Merge the records of runs and write the four files; each is written atomically.

    Args:
        directories: directories of runs or of records; duplicates are ignored.
        out: output directory.

    Raises:
        ArtifactError: records are missing or cannot share a table, or the files cannot be written.
    """
    unique = {directory.resolve(): directory for directory in directories}
    runs = [(str(directory), _linked(directory, out)) for directory in unique.values()]
    board = build_leaderboard(runs)
    write_texts(
        out,
        {
            f"{NAME}.csv": leaderboard_csv(board),
            f"{NAME}.md": leaderboard_markdown(board),
            f"{NAME}.html": leaderboard_html(board),
            f"{NAME}.json": board.to_json(),
        },
    )
    return board


def _linked(directory: Path, out: Path) -> list[tuple[str, Record]]:
    """The records of a run with their paths relative to the leaderboard."""
    return [(Path(os.path.relpath(path, out)).as_posix(), record) for path, record in find_records(directory)]


def leaderboard_html(board: Leaderboard) -> str:
    """The text of leaderboard.html."""
    matrix = board.as_matrix()
    every = columns(matrix)
    ranks = {place.row.variant: place.rank for place in board.places}
    main, rest = main_and_rest(every)
    return (
        environment()
        .get_template("leaderboard.html.j2")
        .render(
            board=board,
            matrix=matrix,
            sheets=(
                make_html_table(matrix, "main", "All records, best first", main, ranks=ranks),
                make_html_table(matrix, "rest", "All other numbers", rest),
            ),
            every=every,
            csv=leaderboard_csv(board),
            plots=plots(matrix),
            speed_names=SPEED_NAMES,
            order=ORDER,
            notes=notes(matrix),
            versions=versions(matrix),
        )
    )


def leaderboard_markdown(board: Leaderboard) -> str:
    """The text of leaderboard.md, in GitHub's Markdown."""
    matrix = board.as_matrix()
    shown = shown_columns(board)
    heads = ["rank", "variant", *(column.heading for column in shown), "verdict", "passes", "recipe", "record"]
    lines = [
        table_line([escaped(head) for head in heads]),
        table_line(["---:", "---", *("---:" for _ in shown), "---", "---", "---", "---"]),
    ]
    for place in (*board.places, *board.unranked):
        row = place.row
        cells = [cell_text(cell(matrix, row, column)) for column in shown]
        told = [escaped(place.verdict or "–"), escaped(row.description), escaped(place.recipe)]
        rank = "–" if place in board.unranked else place.rank
        lines.append(table_line([rank, code(row.variant), *cells, *told, f"[record]({link_to(row)})"]))
    about = [
        f"Suite: {escaped(board.suite)}, sha256 `{board.suite_sha256}`",
        f"Baseline: {escaped(board.baseline)} `{board.baseline_sha256}`",
    ]
    about += [f"Hardware: {escaped(hardware)}" for hardware in board.hardware]
    blocks = ["# Leaderboard", ORDER, "\n".join(lines), "\n".join(f"- {escaped(note)}" for note in notes(matrix))]
    return "\n\n".join([*blocks, "\n".join(f"- {line}" for line in about)]) + "\n"


def shown_columns(board: Leaderboard) -> list[Column]:
    """The headline columns, and KL, which determines the rank."""
    return [column for column in columns(board.as_matrix()) if column.is_in("leaderboard")]


def leaderboard_csv(board: Leaderboard) -> str:
    """The text of leaderboard.csv: every number in full precision, after rank, run, recipe and hardware."""
    places: list[Place] = [*board.places, *board.unranked]
    numbers = csv.DictReader(io.StringIO(to_csv(board.as_matrix())))
    text = io.StringIO()
    heads = ["rank_best", "rank_worst", "run", "recipe", "hardware", "record"]
    writer = csv.DictWriter(text, fieldnames=[*heads, *(numbers.fieldnames or [])], lineterminator="\n")
    writer.writeheader()
    for place, line in zip(places, numbers, strict=True):
        best, worst = (place.best or "", place.worst or "")
        about = (best, worst, place.run, place.recipe, place.row.hardware, place.row.link)
        writer.writerow(dict(zip(heads, about, strict=True)) | line)
    return text.getvalue()
