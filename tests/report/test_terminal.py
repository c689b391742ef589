"""The terminal's table at every width: no cell wraps, and the first four columns are always shown."""

import io

import pytest
from rich.console import Console

from quantlab.evaluation.record import Record
from quantlab.report.matrix.matrix import build_matrix
from quantlab.report.matrix.terminal import print_matrix
from tests.report.conftest import make_task


def printed(records: list[Record], width: int, *, encoding: str = "utf-8", color: bool = False) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    print_matrix(
        build_matrix(records),
        Console(
            file=file,
            width=width,
            force_terminal=color,
            legacy_windows=False,
            color_system="truecolor" if color else None,
        ),
    )
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_lines_fit_and_rows_stay_whole(recipe: list[Record], width: int) -> None:
    lines = printed(recipe, width).splitlines()
    assert max(map(len, lines)) <= width
    assert "accuracy" in lines[1]
    for record in recipe:
        (row,) = [line for line in lines[:12] if line.split()[:1] == [record.variant]]
        assert "…" not in row
    w4a16 = next(line for line in lines if line.startswith("w4a16 "))
    assert "0.92 ±0.31" in w4a16
    assert "34.9" in w4a16
    assert "2.61 ±0.06" in w4a16


def test_wider_terminals_show_more(recipe: list[Record]) -> None:
    heads = [printed(recipe, width).splitlines()[1].split() for width in (50, 80, 120, 160)]
    assert [len(head) for head in heads] == sorted(len(head) for head in heads)
    assert "perplexity" not in heads[0]
    assert "perplexity" in heads[1]
    for head in ("decode", "load", "prefill"):
        assert head in heads[3]


def test_the_head_says_that_speed_is_of_a_twin(recipe: list[Record]) -> None:
    assert "FP16, twin" in printed(recipe, 80)


def test_a_narrow_terminal_loses_no_number(recipe: list[Record]) -> None:
    text = printed(recipe, 50)
    assert "0.92 ±0.31" in text
    assert "2.61 ±0.06" in text


def test_failures_are_shown_with_their_reason(damaged: list[Record]) -> None:
    text = printed(damaged, 120)
    assert "int8: quality could not be measured: no kernel for int8 | activations" in text
    (row,) = [line for line in text.splitlines()[:12] if line.startswith("int8 ")]
    assert row.split()[1] == "failed"


def test_a_name_that_looks_like_markup_is_text(recipe: list[Record]) -> None:
    records = [record.model_copy(update={"hardware": "[bold]one[/bold] machine"}) for record in recipe]
    assert "[bold]one[/bold] machine" in printed(records, 120)


def test_a_terminal_without_unicode_still_shows_everything(recipe: list[Record]) -> None:
    text = printed(recipe, 100, encoding="ascii")
    assert "0.92 +-0.31" in text
    assert "(-0.09 to 0.19)" in text


def test_measurable_losses_are_bold(recipe: list[Record]) -> None:
    text = printed(recipe, 80, color=True)
    assert "\x1b[1m0.92\x1b[0m" in text
    assert "\x1b[1m0.08\x1b[0m" not in text


def test_every_batch_size_that_was_measured_is_shown(rich: list[Record]) -> None:
    head = printed(rich, 300).splitlines()[1]
    assert [head.count(f"decode {batch} ") for batch in (1, 8, 32)] == [1, 1, 1]
    one = [record.model_copy(update={"speed": None}) for record in rich]
    assert "decode" not in printed(one, 300).splitlines()[1]


def test_tasks_stand_in_the_same_table_where_it_is_wide_enough(rich: list[Record]) -> None:
    wide, narrow = printed(rich, 300), printed(rich, 120)
    first, second, *_ = wide.splitlines()[1:]
    assert [f"{name} " in first + " " for name in ("continuation", "last-word", "retrieval")] == [True] * 3
    assert second.count("loss, pts") == 3
    assert wide.count("\nvariant ") == 1
    (row,) = [line for line in wide.splitlines() if line.startswith("w4a16 ")]
    assert len(row.split(" ±")) >= 6, "losses of text and tasks with their margins"
    assert narrow.count("\nvariant ") == 2
    assert "loss, pts" not in narrow.splitlines()[2]
    assert max(map(len, narrow.splitlines())) <= 120


def test_more_tasks_than_fit_stand_in_several_tables(rich: list[Record]) -> None:
    many = [
        record.model_copy(
            update={"tasks": tuple(make_task(f"task-{index}", 0.7, 0.012) for index in range(9)) if number else ()}
        )
        for number, record in enumerate(rich)
    ]
    text = printed(many, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("\nvariant ") >= 3
    heads = [word for word in text.split() if word.startswith("task-")]
    assert heads[:9] == [f"task-{index}" for index in range(9)]
