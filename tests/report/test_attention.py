"""Long contexts by implementation of attention, in every table; and the claim about them."""

import io
import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console

from quantlab.evaluation.record import Attention, AttentionCell, Record
from quantlab.report.claims.check import Claim, Claims, check_claims
from quantlab.report.matrix.attention_table import TITLE, attention_table
from quantlab.report.matrix.html import to_html
from quantlab.report.matrix.markdown import to_markdown
from quantlab.report.matrix.matrix import build_matrix
from quantlab.report.matrix.terminal import print_matrix
from tests.report.conftest import measured

REASON = "not tried: about 210.9 GB needed, 23.2 GB free"
CELLS = (
    AttentionCell(
        implementation="eager",
        context=2048,
        prefill_peak_bytes=800_000_000,
        decode_peak_bytes=44_000_000,
        cache_bytes=4_718_592,
        prefill_tokens_per_second=measured(703.0, 30, 3),
        decode_tokens_per_second=measured(2.41, 0.2, 1),
        quartiles={"prefill_tokens_per_second": (690.0, 711.0)},
        noise={"decode_tokens_per_second": "other processes took 1.0 of 2 cores"},
    ),
    AttentionCell(
        implementation="quantlab_latent_sdpa",
        context=2048,
        prefill_peak_bytes=280_000_000,
        cache_bytes=4_718_592,
        prefill_tokens_per_second=measured(892.0, 30, 3),
        decode_tokens_per_second=measured(6.13, 0.2, 3),
    ),
    AttentionCell(implementation="eager", context=32768, reason=REASON),
)
ATTENTION = Attention(twin="the width of something", layout="bfloat16", memory="process", cells=CELLS)


@pytest.fixture
def attending(recipe: list[Record]) -> list[Record]:
    return [recipe[0].model_copy(update={"attention": ATTENTION}), *recipe[1:]]


def test_every_table_shows_it(attending: list[Record]) -> None:
    matrix = build_matrix(attending)
    printed = io.StringIO()
    print_matrix(matrix, Console(file=printed, width=160))
    markdown, page = to_markdown(matrix, with_plot=False), to_html(matrix)
    for text in (printed.getvalue(), markdown, page):
        for found in (
            REASON.split(",")[0],
            "800 MB",
            "44.0 MB",
            "4.72 MB",
            "703 (690 to 711, n = 3)",
            "2.41 (n = 1) noisy",
        ):
            assert found in text
        assert "the width of something" in text
    assert f"### {TITLE}" in markdown
    assert f"| `eager` | 32,768 | {REASON} | – | – | – | – |" in markdown
    assert f"<h2>{TITLE}</h2>" in page
    note = attention_table(matrix).note  # type: ignore[union-attr]
    assert matrix.hardware in note
    assert "resident size of a separate process" in note
    told = json.loads(matrix.to_json())["attention"]
    assert told["cells"][2]["reason"] == REASON


def test_nothing_is_shown_where_nothing_was_measured(recipe: list[Record], tmp_path: Path) -> None:
    matrix = build_matrix(recipe)
    assert attention_table(matrix) is None
    assert TITLE not in to_markdown(matrix, with_plot=False) + to_html(matrix)
    assert json.loads(matrix.to_json())["attention"] is None


@pytest.mark.parametrize(
    ("fields", "verdict", "value"),
    [
        ({"at_least": 40}, "holds", 65.0),
        ({"at_least": 70}, "does not hold", 65.0),
        ({"at_most": 40}, "does not hold", 65.0),
        ({"equals": 65, "tolerance": 0.5}, "holds", 65.0),
        ({"equals": 40, "tolerance": 0.5}, "better", 65.0),
        ({"at_least": 40, "context": 32768}, "not measured here", None),
        ({"at_least": 40, "attention": "flash_attention_2"}, "not measured here", None),
    ],
)
def test_claims_about_attention_memory_are_checked(
    fields: dict[str, object], verdict: str, value: float | None, attending: list[Record]
) -> None:
    asked = {"attention": "quantlab_latent_sdpa", "context": 2048} | fields
    claim = Claim(text="saves memory", metric="attention_memory_saved_percent", **asked)  # type: ignore[arg-type]
    matrix = build_matrix(attending, claims=Claims(title="claims", claims=(claim,)))
    assert matrix.claims is not None
    (checked,) = matrix.claims.claims
    assert (checked.verdict, checked.value) == (verdict, pytest.approx(value) if value else value)
    assert "tokens" in checked.note
    assert check_claims(Claims(title="x", claims=(claim,)), matrix.rows, baseline="source").claims[0].value is None


@pytest.mark.parametrize(
    "fields",
    [
        {"metric": "attention_memory_saved_percent", "at_least": 40},
        {"metric": "attention_memory_saved_percent", "attention": "sdpa", "at_least": 40},
        {"metric": "speed_over_fp16", "variant": "int8", "attention": "sdpa", "context": 2048, "at_least": 1},
        {"metric": "attention_memory_saved_percent", "attention": "sdpa", "context": 2048},
        {
            "metric": "attention_memory_saved_percent",
            "attention": "sdpa",
            "context": 2048,
            "variant": "int8",
            "at_least": 1,
        },
        {"metric": "attention_memory_saved_percent", "attention": "sdpa", "context": 2048, "better_than": "int8"},
    ],
)
def test_claims_that_are_not_whole(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=r"attention_memory_saved_percent|does not say what it claims"):
        Claim(text="saves memory", **fields)  # type: ignore[arg-type]
