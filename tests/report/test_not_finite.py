"""For any number that is not finite or missing, every page is built and reports it."""

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from quantlab.evaluation.record import Attention, AttentionCell, Record
from quantlab.report.leaderboard.files import leaderboard_html, leaderboard_markdown
from quantlab.report.leaderboard.leaderboard import build_leaderboard
from quantlab.report.matrix.csv_file import to_csv
from quantlab.report.matrix.html import to_html, to_svg
from quantlab.report.matrix.markdown import to_markdown
from quantlab.report.matrix.matrix import build_matrix
from quantlab.report.matrix.terminal import print_matrix
from tests.report.conftest import enrich, make_recipe, measured

CELL = AttentionCell(implementation="sdpa", context=2048, prefill_tokens_per_second=measured(99.0, 2.0, 3))


def complete() -> list[Record]:
    records = [enrich(record) for record in make_recipe()]
    attention = Attention(twin="twin", layout="bfloat16", memory="process", cells=(CELL,))
    return [records[0].model_copy(update={"attention": attention}), records[2], records[4]]


def floats(found: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    if isinstance(found, float):
        yield path
    for key, value in items:
        yield from floats(value, (*path, key))


def kinds() -> dict[str, tuple[int, tuple[Any, ...]]]:
    """One path for every kind of number of a record: field names without list indices and interval ends."""
    found = {}
    for index, record in enumerate(complete()):
        for path in floats(json.loads(record.model_dump_json())):
            names = [
                part.rstrip("0123456789") for part in path if isinstance(part, str) and part not in ("low", "high")
            ]
            found.setdefault(".".join(names), (index, path))
    return found


def pages(records: list[Record]) -> str:
    matrix = build_matrix(records)
    board = build_leaderboard([("run", [(f"{record.variant}.json", record) for record in records])])
    console = Console(file=io.StringIO(), width=140)
    print_matrix(matrix, console)
    texts = to_html(matrix), to_svg(matrix) or "", to_markdown(matrix, with_plot=True), to_csv(matrix)
    return "\n".join([*texts, leaderboard_html(board), leaderboard_markdown(board), console.file.getvalue()])


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_every_page_survives_what_is_no_number(kind: str) -> None:
    index, path = kinds()[kind]
    records = complete()
    changed = json.loads(records[index].model_dump_json())
    at = changed
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = float("nan")
    records[index] = Record.model_validate(changed)
    matrix = build_matrix(records)
    text = pages(records)
    assert ">nan" not in text
    assert " nan" not in text
    assert "no finite number" in text or (
        matrix.attention and "no finite number" in str(matrix.attention.cells[0].reason)
    )


@pytest.mark.parametrize(
    "field", ["quality", "memory", "speed", "tasks", "versions", "tokens_per_expert", "matrix_errors"]
)
def test_every_page_survives_what_is_missing(field: str) -> None:
    empty: dict[str, Any] = {"tasks": (), "versions": {}, "tokens_per_expert": {"layer 1": ()}, "matrix_errors": ()}
    for some in (slice(0, 1), slice(1, 2), slice(0, 3)):
        records = complete()
        records[some] = [record.model_copy(update={field: empty.get(field)}) for record in records[some]]
        assert pages(records)
