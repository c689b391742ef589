"""The verdict is a loss only if the interval excludes zero and p stays significant after correction for the rows."""

import csv
import hashlib
import io
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from quantlab.evaluation.measured import Measured, Significance, verdict
from quantlab.evaluation.record import Record
from quantlab.report.files import write_report
from quantlab.report.matrix.matrix import build_matrix
from quantlab.report.matrix.model_cards import END, START
from quantlab.report.matrix.recommend import recommend
from quantlab.report.matrix.row_verdicts import judge, summary
from quantlab.report.matrix.terminal import print_matrix
from tests.report.conftest import make_task, measured

Make = Callable[..., Record]


@pytest.mark.parametrize(
    ("value", "half", "holm_p", "expected"),
    [
        (1.0, 0.5, None, "loss"),
        (-1.0, 0.5, None, "gain"),
        (0.3, 0.5, None, "no measurable loss"),
        (0.5, 0.5, None, "no measurable loss"),
        (1.0, 0.5, 0.2, "no measurable loss"),
        (1.0, 0.5, 0.01, "loss"),
        (0.3, 0.5, 0.01, "no measurable loss"),
    ],
)
def test_one_loss(value: float, half: float, holm_p: float | None, expected: str) -> None:
    loss = measured(value, half)
    significance = None if holm_p is None else Significance(p=0.01, holm_p=holm_p, verdict=verdict(loss, holm_p))
    assert judge(loss, significance) == expected


def test_the_verdict_is_the_records() -> None:
    """The report uses the record's verdict and does not compute its own."""
    assert judge(measured(1.0, 0.5), Significance(p=0.01, verdict="no measurable loss")) == "no measurable loss"
    few = Measured(value=1.0, low=0.5, high=1.5, n=5, interval="range", reason="5 documents")
    assert judge(few, None) is None


def test_every_table_says_what_the_record_says(rich: list[Record], tmp_path: Path) -> None:
    """The interval excludes zero, but the loss is not significant after correction: every table shows the record's verdict."""
    quality = rich[4].quality
    assert quality is not None
    said = Significance(p=0.03, holm_p=0.09, verdict="no measurable loss")
    lone = rich[4].model_copy(
        update={
            "tasks": (),
            "quality": quality.model_copy(update={"significance": dict.fromkeys(quality.significance, said)}),
        }
    )
    artifact = tmp_path / "artifacts" / "w4a16"
    artifact.mkdir(parents=True)
    (artifact / "README.md").write_text(f"{START}\n{END}\n")
    (artifact / "manifest.json").write_text("{}")
    lone = lone.model_copy(update={"artifact_sha256": hashlib.sha256(b"{}").hexdigest()})
    matrix = write_report([rich[0], lone], tmp_path)
    console = Console(file=io.StringIO(), width=160)
    print_matrix(matrix, console)
    assert "No measurable loss: w4a16." in console.file.getvalue()
    assert (
        "| `w4a16` | 0.92 (0.61 to 1.23) | 34.9 | 2.61 (2.55 to 2.67) | no measurable loss |"
        in (tmp_path / "matrix.md").read_text()
    )
    page = (tmp_path / "matrix.html").read_text()
    assert 'data-lost="no"' in page
    assert "▼" not in page
    assert "measurable loss · p = 0.09 after Holm" in page
    assert "**no measurable loss**" in (artifact / "README.md").read_text()
    (line,) = [line for line in csv.DictReader((tmp_path / "matrix.csv").open()) if line["variant"] == "w4a16"]
    assert line["verdict"] == "no measurable loss"


def test_nothing_measured_is_no_verdict(recipe: list[Record]) -> None:
    assert judge(None, None) is None
    rows = build_matrix([record.model_copy(update={"quality": None}) for record in recipe]).rows
    assert {summary(row) for row in rows} == {None}


def test_a_row_names_what_it_lost(recipe: list[Record], constructed: Make) -> None:
    made = constructed("a", loss=(0.1, 0.2), rise=(1, 0.2))
    tasks = (make_task("x", 0.7, 0.05, p=0.001), make_task("y", 0.7, 0.0), make_task("z", 0.7, 0.05, p=0.04))
    rows = build_matrix([recipe[0], made, made.model_copy(update={"variant": "b", "tasks": tasks})]).rows
    assert [summary(row) for row in rows] == [None, "loss: perplexity", "loss: perplexity, 1 of 3 tasks"]


def test_quality_is_not_recommended_where_a_task_was_lost(recipe: list[Record], constructed: Make) -> None:
    small = constructed("small", loss=(0, 0.1), rise=(0, 0.1), memory=30)
    large = constructed("large", loss=(0, 0.1), rise=(0, 0.1), memory=90)
    assert recommend(build_matrix([recipe[0], small, large]))[0].variant == "small"
    harmed = small.model_copy(update={"tasks": (make_task("x", 0.7, 0.05, p=0.001),)})
    assert recommend(build_matrix([recipe[0], harmed, large]))[0].variant == "large"


def test_a_noisy_speed_is_recommended_by_the_lower_end_of_its_interval(recipe: list[Record], constructed: Make) -> None:
    def noisy(record: Record) -> Record:
        assert record.speed is not None
        noise = {"decode_tokens_per_second.1": "others took a core"}
        return record.model_copy(update={"speed": record.speed.model_copy(update={"noise": noise})})

    fast = constructed("fast", loss=(0, 0.1), rise=(0, 0.1), speed=(4, 0.1))
    slow = constructed("slow", loss=(0, 0.1), rise=(0, 0.1), speed=(2, 0.1))
    assert recommend(build_matrix([recipe[0], fast, slow]))[2].variant == "fast"
    found = recommend(build_matrix([recipe[0], noisy(fast), slow]))[2]
    assert found.variant == "fast"
    assert "fast decodes at least 3.9× as fast as FP16 (3.90 to 4.10, noisy: others took a core)" in found.sentence
    wide = constructed("wide", loss=(0, 0.1), rise=(0, 0.05), speed=(2.5, 1.2))
    found = recommend(build_matrix([recipe[0], noisy(wide), slow]))[2]
    assert found.variant == "slow", "1.3 is all that is sure of the other"
    assert found.sentence.endswith("; wide may be faster, but the measurement was disturbed.")
    both = recommend(build_matrix([recipe[0], noisy(wide), noisy(slow)]))[2]
    assert both.sentence.startswith(
        "slow decodes at least 1.9× as fast as FP16 (1.90 to 2.10, noisy: others took a core)"
    )
    vague = constructed("vague", loss=(0, 0.1), rise=(0, 0.1), speed=(2, 1.2))
    none = recommend(build_matrix([recipe[0], noisy(vague)]))[2]
    assert none.variant is None
    assert none.sentence.endswith(
        "measurably faster than FP16 at batch size 1, measured on a machine that was disturbed."
    )


def test_rows_that_lost_nothing_are_seldom_called_losses() -> None:
    """500 matrices of eight rows without a true loss: intervals alone give a loss in many of them, Holm in 5 %."""
    generator = random.Random(0)
    alone = corrected = 0
    for _ in range(500):
        values = [generator.gauss(0, 1) for _ in range(8)]
        p_values = [_two_sided(value) for value in values]
        adjusted = _holm(p_values)
        rows = [Measured(value=v, low=v - 1.959964, high=v + 1.959964, n=9) for v in values]
        alone += any(judge(row, None) != "no measurable loss" for row in rows)
        corrected += any(
            judge(row, Significance(p=p, holm_p=holm, verdict=verdict(row, holm))) != "no measurable loss"
            for row, p, holm in zip(rows, p_values, adjusted, strict=True)
        )
    assert alone > 0.25 * 500
    assert corrected <= 0.075 * 500


def _two_sided(z: float) -> float:
    return math.erfc(abs(z) / math.sqrt(2))


def _holm(p_values: list[float]) -> list[float]:
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
