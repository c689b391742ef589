"""Verdicts of engines in every table: a column only where there are some, and the details on page and card."""

import csv
import io
import json

import pytest
from rich.console import Console

from quantlab.evaluation.engines.verdict import EngineModules, EngineVerdict, SingleLayer
from quantlab.evaluation.record import Record
from quantlab.report.matrix.csv_file import to_csv
from quantlab.report.matrix.engine_table import engine_table, verdicts_of
from quantlab.report.matrix.html import to_html
from quantlab.report.matrix.markdown import to_markdown
from quantlab.report.matrix.matrix import build_matrix
from quantlab.report.matrix.model_cards import measured_section
from quantlab.report.matrix.terminal import print_matrix
from tests.report.conftest import measured

AGREES = EngineVerdict(
    engine="transformers",
    version="5.24.0",
    format="compressed-tensors",
    verdict="agrees",
    criterion="rms at most 0.0001 nats (float32)",
    dtype="float32",
    text="24 texts of held-out text",
    tokens=1968,
    nll_difference=measured(1e-7, 2e-7, 1968),
    nll_rms=1.3e-6,
    top1_agreement=1.0,
    greedy_agreement=0.75,
    source_nll_rms=1.1e-6,
    modules=(EngineModules(module="Linear", scheme="weights int4 per group of 128", count=21, example="a"),),
    unexpected=tuple(f"model.layers.3.{name}" for name in "abcde"),
    peak_memory_bytes=1_230_000_000,
    prefill_tokens_per_second=512.3,
    versions={"torch": "2.13.0"},
)
DIFFERS = EngineVerdict(
    engine="vllm",
    version="0.32.0",
    format="gptq",
    verdict="differs",
    reason="2 of 2 single linears differ | <o_proj>",
    layers=(SingleLayer(module="model.layers.0.self_attn.o_proj", difference=0.01, rule="rounded by absmax / 127.5"),),
    missing=("model.norm.weight",),
)
TOLD = "transformers: agrees, vllm on gptq: differs"


@pytest.fixture
def judged(recipe: list[Record]) -> list[Record]:
    """The recipe, of which engines judged w4a16."""
    return [
        record.model_copy(update={"engines": (AGREES, DIFFERS)}) if record.variant == "w4a16" else record
        for record in recipe
    ]


def test_every_table_has_the_verdicts(judged: list[Record]) -> None:
    matrix = build_matrix(judged)
    lines = {line["variant"]: line for line in csv.DictReader(io.StringIO(to_csv(matrix)))}
    assert (lines["w4a16"]["engines"], lines["fp16"]["engines"]) == (TOLD, "")
    rows = {row["variant"]: row for row in json.loads(matrix.to_json())["rows"]}
    assert [found["verdict"] for found in rows["w4a16"]["engines"]] == ["agrees", "differs"]
    assert rows["fp16"]["engines"] == []
    markdown = to_markdown(matrix, with_plot=False)
    head, _, *body = next(block for block in markdown.split("\n\n") if block.startswith("| variant")).splitlines()
    assert head.endswith("| engines |")
    assert {line.count("|") - line.count("\\|") for line in body} == {head.count("|")}
    page = to_html(matrix)
    console = Console(record=True, width=250, file=io.StringIO())
    print_matrix(matrix, console)
    printed = console.export_text()
    for text in (markdown, page, printed):
        assert TOLD in text
    assert "differs: 2 of 2 single linears differ" in printed
    for text in (markdown.replace("\\", ""), page):
        assert "21 Linear: weights int4 per group of 128" in text
        assert "model.layers.3.a, model.layers.3.b, model.layers.3.c and 2 more" in text
        assert "model.layers.0.self_attn.o_proj differs by 0.01 (rounded by absmax / 127.5)" in text
    assert "<o_proj>" not in page


def test_nothing_is_said_where_no_engine_was_asked(recipe: list[Record]) -> None:
    matrix = build_matrix(recipe)
    assert engine_table(matrix) is None
    assert all(verdicts_of(row) == "" for row in matrix.rows)
    texts = (to_markdown(matrix, with_plot=False), to_html(matrix), to_csv(matrix), matrix.to_json())
    assert not any("engines" in text for text in texts)


def test_the_model_card_has_a_short_table(judged: list[Record]) -> None:
    matrix = build_matrix(judged)
    by_name = {row.variant: measured_section(matrix, row) for row in matrix.rows}
    assert (
        "| transformers 5.24.0 | **agrees** | 1.3e−6 | 100.00 | rms at most 0.0001 nats (float32) |" in by_name["w4a16"]
    )
    assert "| vllm on gptq 0.32.0 | **differs** |" in by_name["w4a16"]
    assert "engine" not in by_name["fp16"]


def test_a_record_with_verdicts_is_read_again_and_numbers_are_finite(judged: list[Record]) -> None:
    record = next(record for record in judged if record.engines)
    assert Record.model_validate_json(record.model_dump_json()) == record
    with pytest.raises(ValueError, match="finite number"):
        EngineVerdict(engine="vllm", format="dense", verdict="agrees", nll_rms=float("nan"))
