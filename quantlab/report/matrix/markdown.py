"""matrix.md: the matrix as GitHub renders it."""

import re

from quantlab.report.claims.table import claims_table
from quantlab.report.matrix.attention_table import attention_table
from quantlab.report.matrix.columns import GROUPS, Column, columns
from quantlab.report.matrix.engine_table import HEADING, MEANING, EngineTable, engine_table, has_verdicts, verdicts_of
from quantlab.report.matrix.layer_maps import layer_maps
from quantlab.report.matrix.matrix import Matrix
from quantlab.report.matrix.recommend import RULES, recommend
from quantlab.report.matrix.row_verdicts import summary
from quantlab.report.matrix.rows import Row
from quantlab.report.matrix.table_cells import TableCell, cell, counts, failures, notes, served_warnings, tokens_of

_MOST_LAYERS = 16


def to_markdown(matrix: Matrix, *, with_plot: bool) -> str:
    """The text of matrix.md; `with_plot` embeds matrix.svg, which must be in the same directory."""
    every = columns(matrix)
    headline = [column for column in every if column.is_headline]
    rest = [column for column in every if not column.is_headline]
    blocks = [
        f"# {escaped(matrix.recipe)}: accuracy loss × memory × speed",
        "![Accuracy loss against memory, coloured by speed](matrix.svg)" if with_plot else "",
        "\n".join(f"- **{found.goal.capitalize()}:** {escaped(found.sentence)}" for found in recommend(matrix)),
        _table(matrix, headline, with_description=True),
        "## Details",
        *(
            _table(matrix, [column for column in rest if column.group == group])
            for group in GROUPS
            if any(column.group == group for column in rest)
        ),
        *_attention(matrix),
        *_engines(matrix),
        *_layers(matrix),
        *_claims(matrix),
        "## How to read this",
        "\n".join(f"- {escaped(note)}" for note in (*served_warnings(matrix), *notes(matrix))),
        "\n".join(f"- **{escaped(column.heading)}:** {escaped(column.meaning)}" for column in every)
        + (f"\n- **{HEADING}:** {escaped(MEANING)}" if has_verdicts(matrix) else ""),
        "\n".join(
            f"- **{goal.capitalize()} is recommended by this rule:** {escaped(rule)}" for goal, rule in RULES.items()
        ),
    ]
    if failures(matrix):
        blocks += ["## Not measured", "\n".join(f"- {escaped(line)}" for line in failures(matrix))]
    blocks += ["## Provenance", _provenance(matrix)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _table(matrix: Matrix, shown: list[Column], *, with_description: bool = False) -> str:
    engines = [HEADING] if with_description and has_verdicts(matrix) else []
    texts = [*(["verdict", "passes"] if with_description else []), *engines]
    heads = [
        "variant",
        *(column.heading + (f" ({column.timed})" if column.timed else "") for column in shown),
        *texts,
    ]
    lines = [
        table_line([escaped(head) for head in heads]),
        table_line(["---", *("---:" for _ in shown), *("---" for _ in texts)]),
    ]
    for row in matrix.rows:
        told: set[str] = set()
        cells = [_text(cell(matrix, row, column), column, told) for column in shown]
        told_of = [escaped(summary(row) or "–"), escaped(row.description)] if with_description else []
        told_of += [escaped(verdicts_of(row) or "–") for _ in engines]
        lines.append(table_line([_variant(matrix, row), *cells, *told_of]))
    rests_on = [counts(matrix, column) or "–" for column in shown]
    if any(count != "–" for count in rests_on):
        lines.append(table_line(["*n*", *rests_on, *("" for _ in texts)]))
    return "\n".join(lines)


def _text(found: TableCell, column: Column, told: set[str]) -> str:
    """A table cell as text. The reason of a failure is shown only in the first cell of its group."""
    if found.state == "failed":
        reason = "" if column.group in told else f": {escaped(found.reason or '')}"
        told.add(column.group)
        return f"failed{reason}"
    return cell_text(found)


def cell_text(found: TableCell) -> str:
    """A number with its interval and the mark of noise."""
    noise = " noisy" if found.noise else ""
    return f"{found.text} ({found.interval}){noise}" if found.interval else found.text + noise


def _variant(matrix: Matrix, row: Row) -> str:
    name = code(row.variant)
    return f"{name} (baseline)" if row.variant == matrix.baseline else name


def _attention(matrix: Matrix) -> list[str]:
    """The section on long contexts; empty if they were not measured."""
    table = attention_table(matrix)
    if table is None:
        return []
    lines = [table_line(list(table.heads)), table_line(["---", *("---:" for _ in table.heads[1:])])]
    for line in table.lines:
        cells = (line.reason, *("–" for _ in line.cells[1:])) if line.reason else line.cells
        lines.append(table_line([f"`{line.implementation}`", line.context, *(escaped(text) for text in cells)]))
    return [f"### {table.title}", "\n".join(lines), escaped(table.note)]


def _engines(matrix: Matrix) -> list[str]:
    """The section on other engines; empty if none judged an artifact."""
    table = engine_table(matrix)
    if table is None:
        return []
    return [f"### {table.title}", engine_lines(table), engine_details(table)]


def engine_lines(table: EngineTable) -> str:
    """The verdicts of engines and their numbers."""
    lines = [table_line(list(table.heads)), table_line(["---", "---", "---", *("---:" for _ in table.heads[3:])])]
    for line in table.lines:
        lines.append(
            table_line([code(line.variant), escaped(line.engine), f"**{line.verdict}**", *map(escaped, line.numbers)])
        )
    return "\n".join(lines)


def engine_details(table: EngineTable) -> str:
    """Reason, criterion and further facts of every verdict, as a list."""
    return "\n".join(
        f"- {code(line.variant)}, {escaped(line.engine)}: **{line.verdict}**"
        + (f", {escaped(line.reason)}" if line.reason else "")
        + "".join(f"\n  - {escaped(text)}" for text in line.details)
        for line in table.lines
    )


def _layers(matrix: Matrix) -> list[str]:
    """The layers that stand out, with the numbers if they fit on a page."""
    blocks = []
    for found in layer_maps(matrix):
        blocks += [
            f"### {found.caption}",
            escaped(found.meaning),
            *(f"**{escaped(text)}**" for text in found.sentences),
        ]
        if len(found.heads) <= _MOST_LAYERS:
            heads = [found.corner, *(f"{found.unit} {head}" for head in found.heads)]
            lines = [table_line(heads), table_line(["---", *("---:" for _ in found.heads)])]
            lines += [table_line([code(name), *(tile.text for tile in tiles)]) for name, tiles in found.lines]
            blocks.append("\n".join(lines))
    return blocks


def _claims(matrix: Matrix) -> list[str]:
    table = claims_table(matrix)
    if table is None:
        return []
    lines = [table_line(list(table.heads)), table_line(["---" for _ in table.heads])]
    for line in table.lines:
        lines.append(
            table_line([escaped(text) for text in (line.text, line.claimed, line.measured, line.verdict, line.note)])
        )
    return [f"## {escaped(table.title)}", "\n".join(lines)]


def _provenance(matrix: Matrix) -> str:
    tokens = tokens_of(matrix)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(matrix.rows[0].record.versions.items()))
    entries = [
        ("Recipe", f"{escaped(matrix.recipe)}, sha256 `{matrix.recipe_sha256}`"),
        ("Suite", f"{escaped(matrix.suite)}, sha256 `{matrix.suite_sha256}`"),
        ("Tokens", ", ".join(f"{count:,}" for count in tokens)),
        ("Hardware", escaped(matrix.hardware)),
        ("Versions", escaped(versions)),
    ]
    return "\n".join(f"- {label}: {text}" for label, text in entries if text)


def table_line(cells: list[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def code(text: str) -> str:
    """Text as inline code, also safe within a table."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"


def escaped(text: str) -> str:
    """Escape text so that it neither breaks a table nor is read as markup."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))
