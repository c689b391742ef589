"""matrix.md and matrix.csv parse back to the numbers they were made from."""

import csv
import io
import re

import pytest
from markdown_it import MarkdownIt

from quantlab.evaluation.record import Record
from quantlab.report.cells import PRUNED_NOTE, human_bytes, number
from quantlab.report.markdown import to_markdown
from quantlab.report.matrix import build_matrix
from quantlab.report.spreadsheet import to_csv


def tables(markdown: str) -> list[list[list[str]]]:
    """Every table as rows of cell texts, parsed as GitHub does."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif (
            token.type == "inline"
            and token.level >= 3
            and found
            and token.children is not None
            and token.map is not None
            and found[-1]
            and token.level > 3
        ):
            found[-1][-1].append("".join(child.content for child in token.children))
    return found


def plain(text: str) -> float:
    return float(text.split(" ")[0].replace("−", "-").replace(",", ""))


def test_markdown_tables_hold_the_numbers(recipe: list[Record]) -> None:
    matrix = build_matrix(recipe)
    first, *details = tables(to_markdown(matrix, with_plot=True))
    assert first[0] == [
        "variant",
        "accuracy loss %",
        "memory % of FP16",
        "speed × FP16 (random-weight twin)",
        "verdict",
        "passes",
    ]
    assert all(len(line) == len(table[0]) for table in (first, *details) for line in table)
    assert [line[0] for line in first[1:]] == ["source (baseline)", *(row.variant for row in matrix.rows[1:])]
    assert first[1][1] == "baseline"
    for line, row in zip(first[2:], matrix.rows[1:], strict=True):
        assert row.accuracy_loss_percent is not None
        assert row.speed_over_fp16 is not None
        assert plain(line[1]) == pytest.approx(row.accuracy_loss_percent.value, abs=0.005)
        assert plain(line[2]) == pytest.approx(row.memory_percent_of_fp16, abs=0.05)
        assert plain(line[3]) == pytest.approx(row.speed_over_fp16.value, abs=0.005)
        low, high = re.findall(r"[−\d.]+", line[1].split("(")[1])
        assert plain(low) == pytest.approx(row.accuracy_loss_percent.low, abs=0.005)
        assert plain(high) == pytest.approx(row.accuracy_loss_percent.high, abs=0.005)


def test_markdown_tells_failures_and_escapes_them(damaged: list[Record]) -> None:
    first, *_ = tables(to_markdown(build_matrix(damaged), with_plot=False))
    by_name = {line[0]: line for line in first[1:]}
    assert by_name["int8"][1] == "failed: no kernel for int8 | activations of 4 dimensions: `o_proj` <layer 3>"
    assert by_name["pruned-8"][1:4] == ["failed: killed: out of memory", "–", "failed: timed out after 600 s"]
    assert by_name["w4a16"][3] == "–"


def test_markdown_says_where_the_numbers_come_from(recipe: list[Record]) -> None:
    text = to_markdown(build_matrix(recipe), with_plot=True)
    for needed in (
        recipe[0].recipe_sha256,
        recipe[0].suite_sha256,
        "65,536",
        "torch 2.13.0",
        "AMD EPYC",
        "95 %",
        PRUNED_NOTE,
        "](matrix.svg)",
    ):
        assert needed in text
    assert "matrix.svg" not in to_markdown(build_matrix(recipe), with_plot=False)


def test_the_note_on_pruning_needs_a_pruned_row(recipe: list[Record]) -> None:
    assert PRUNED_NOTE not in to_markdown(build_matrix(recipe[:6]), with_plot=True)


def test_different_versions_are_told(recipe: list[Record]) -> None:
    recipe[2] = recipe[2].model_copy(update={"versions": {"torch": "2.12.0"}})
    assert "different versions" in to_markdown(build_matrix(recipe), with_plot=True)


def test_csv_holds_the_numbers_in_full(damaged: list[Record]) -> None:
    matrix = build_matrix(damaged)
    lines = list(csv.DictReader(io.StringIO(to_csv(matrix))))
    assert [line["variant"] for line in lines] == [row.variant for row in matrix.rows]
    for line, row in zip(lines, matrix.rows, strict=True):
        assert line["memory_percent_of_fp16"] == (
            "" if row.memory_percent_of_fp16 is None else repr(row.memory_percent_of_fp16)
        )
        for name in ("accuracy_loss_percent", "speed_over_fp16", "perplexity", "kl_to_baseline", "top1_agreement"):
            measured = getattr(row, name)
            parts = (line[name], line[f"{name}_low"], line[f"{name}_high"], line[f"{name}_n"])
            assert parts == (
                ("",) * 4
                if measured is None
                else tuple(map(repr, (measured.value, measured.low, measured.high, measured.n)))
            )
        at_8 = row.decode_tokens_per_second["8"]
        assert line["decode_tokens_per_second_8"] == ("" if at_8 is None else repr(at_8.value))
    assert "quality: no kernel for int8" in next(line for line in lines if line["variant"] == "int8")["failures"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_999_000, "10.0 MB"),
        (18_900_000, "18.9 MB"),
        (999_600_000, "1.00 GB"),
        (1.3e12, "1.30 TB"),
        (9e15, "9000 TB"),
    ],
)
def test_bytes_in_powers_of_1000(value: float, text: str) -> None:
    assert human_bytes(value) == text


def test_numbers_have_a_real_minus_and_no_minus_zero() -> None:
    assert number(-0.123, "change") == "−0.12"
    assert number(-0.001, "change") == "0.00"
    assert number(0.00003, "nats") == "3.0e-5"
    assert number(1234.5, "rate") == "1,234"
    assert number(0.99815, "share") == "99.81"
