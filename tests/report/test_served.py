"""The served path and the timed model in tables."""

import io

import pytest
from rich.console import Console

from quantlab.evaluation.record import Record
from quantlab.evaluation.served.metrics import Served
from quantlab.evaluation.speed.metrics import Timed
from quantlab.report.matrix.columns import columns
from quantlab.report.matrix.html import to_html
from quantlab.report.matrix.markdown import to_markdown
from quantlab.report.matrix.matrix import Matrix, build_matrix
from quantlab.report.matrix.table_cells import served_warnings
from quantlab.report.matrix.terminal import print_matrix
from tests.report.conftest import measured


def decoded(record: Record, kl: float) -> Record:
    found = Served(
        served_kl=measured(kl, 0.1 * kl, 528),
        greedy_agreement=measured(0.8, 0.1, 1024),
        served_top1_agreement=measured(0.97, 0.01, 528),
        served_dtype="bfloat16",
        served_steps="fused steps",
    )
    return record.model_copy(update={"served": found})


def timed(record: Record, kind: Timed) -> Record:
    assert record.speed is not None
    return record.model_copy(update={"speed": record.speed.model_copy(update={"timed": kind})})


def printed(matrix: Matrix) -> str:
    console = Console(file=io.StringIO(), width=250)
    print_matrix(matrix, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_more_than_rounding_is_warned_of(recipe: list[Record]) -> None:
    kl = {"source": 2e-3, "fp16": 3e-5, "int8": 5e-3, "w4a16": 1e-2}
    matrix = build_matrix([decoded(record, kl.get(record.variant, 2e-3)) for record in recipe])
    (warning,) = served_warnings(matrix)
    assert warning == (
        "w4a16 decoded in bfloat16 (fused steps) is 0.0100 nats per token from itself in float32, where source is 0.0020: "
        "more than rounding explains."
    )
    assert warning in to_markdown(matrix, with_plot=False).replace("\\", "")
    assert warning in to_html(matrix)
    assert "w4a16 decoded in bfloat16" in printed(matrix)
    assert {"served_kl", "greedy_agreement", "served_top1_agreement"} <= {column.key for column in columns(matrix)}


def test_a_thousandth_of_a_nat_is_never_warned_of(recipe: list[Record]) -> None:
    quiet = build_matrix([decoded(record, 1e-5 if record.variant == "source" else 9e-4) for record in recipe])
    assert served_warnings(quiet) == ()
    assert served_warnings(build_matrix(recipe)) == (), "records of earlier versions"
    assert "served_kl" not in {column.key for column in columns(build_matrix(recipe))}


@pytest.mark.parametrize(
    ("kind", "head", "meaning", "short"),
    [
        ("twin", "random-weight twin", "measured on a random-weight twin", "FP16, twin"),
        ("own layers", "own layers, random weights", "twin of the model's own layers", "FP16, layers"),
        ("artifact", "the artifact itself", "measured on the artifact itself", "FP16"),
    ],
)
def test_heads_of_speed_say_what_was_timed(
    recipe: list[Record], kind: Timed, head: str, meaning: str, short: str
) -> None:
    matrix = build_matrix([timed(record, kind) for record in recipe])
    speed = [column for column in columns(matrix) if column.group == "speed"]
    assert {column.timed for column in speed} == {head}
    found = {column.key: column for column in speed}
    for key in ("speed_over_fp16", "decode_tokens_per_second.8"):
        assert meaning in found[key].meaning
        assert "{" not in found[key].meaning + found[key].metric.head
    assert found["speed_over_fp16"].metric.head == f"speed ×\n{short}"
    assert f"speed × FP16 ({head})" in to_markdown(matrix, with_plot=False)
    assert f'<span class="twin">{head}</span>' in to_html(matrix)
    assert printed(matrix)
