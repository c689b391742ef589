"""The measured numbers of a variant in the model card of its artifact.

The card has a marked section for them. The manifest hashes every file of the artifact except the card, so filling in the card
does not change the measured artifact. A card that the manifest does hash is not modified.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from quantlab.evaluation.speed.metrics import TIMED_WORDS
from quantlab.report.matrix.card_results import usage, with_results
from quantlab.report.matrix.columns import columns
from quantlab.report.matrix.engine_table import NUMBERS, engine_line
from quantlab.report.matrix.markdown import cell_text, escaped, table_line
from quantlab.report.matrix.matrix import Matrix
from quantlab.report.matrix.row_verdicts import summary
from quantlab.report.matrix.rows import Row
from quantlab.report.matrix.table_cells import cell, notes

START, END = "<!-- measured by quantlab -->", "<!-- end of what was measured -->"


def filled_cards(matrix: Matrix, directory: Path) -> Iterator[tuple[Path, str]]:
    """Path and new text of the card of every artifact of the matrix that lies in the run's directory."""
    for row in matrix.rows:
        artifact = directory / "artifacts" / row.variant
        card = artifact / "README.md"
        if row.record.artifact != f"artifacts/{row.variant}" or not card.is_file() or _hashes_its_card(artifact):
            continue
        text = card.read_text(encoding="utf-8")
        before, start, rest = text.partition(START + "\n")
        _, end, after = rest.partition(END + "\n")
        if start and end:
            yield card, f"{with_results(before, row.record)}{start}{measured_section(matrix, row)}{end}{after}"


def _hashes_its_card(artifact: Path) -> bool:
    manifest = artifact / "manifest.json"
    return not manifest.is_file() or "README.md" in json.loads(manifest.read_bytes()).get("files", {})


def _engines(row: Row) -> list[str]:
    """The verdicts of other engines; empty if there are none."""
    if not row.record.engines:
        return []
    lines = [
        table_line(["engine", "verdict", "rms, nats", "top-1 %", "why"]),
        table_line(["---", "---", "---:", "---:", "---"]),
    ]
    for found in row.record.engines:
        line = engine_line(row, found)
        numbers = dict(zip(NUMBERS, line.numbers, strict=True))
        why = escaped(line.reason or found.criterion)
        lines.append(
            table_line([escaped(line.engine), f"**{line.verdict}**", numbers["rms, nats"], numbers["top-1 %"], why])
        )
    return ["", *lines]


def measured_section(matrix: Matrix, row: Row) -> str:
    """The row of the matrix as Markdown, one number per line."""
    lines = [table_line(["number", "value (95 % interval)", "n"]), table_line(["---", "---:", "---:"])]
    for column in columns(matrix):
        found = cell(matrix, row, column)
        if found.state == "value" and column.is_in("cards"):
            n = "–" if found.n is None else f"{found.n:,}"
            lines.append(table_line([escaped(column.heading), cell_text(found), n]))
    told = summary(row)
    about = [
        *([f"Against `{matrix.baseline}`: **{told}**.\n"] if told else []),
        *lines,
        "",
        f"Suite {escaped(matrix.suite)} (sha256 `{matrix.suite_sha256[:12]}`), {escaped(matrix.hardware)}. "
        + " ".join(escaped(note) for note in notes(matrix)[:1]),
        *([f"Speed: {TIMED_WORDS[row.speed.timed].head}, {escaped(row.speed.twin)}."] if row.speed else []),
        *(f"Not measured: {failure.cell}: {escaped(failure.reason)}" for failure in row.failures),
        *_engines(row),
        *usage(row.record),
    ]
    return "\n".join(about) + "\n"
