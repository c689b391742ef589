"""Two seeds and two metrics of one task are separate entries in all tables."""

import csv
import io
from pathlib import Path

import pytest

from quantlab.evaluation.record import Record
from quantlab.report.comparison.compare import compare
from quantlab.report.leaderboard.leaderboard import build_leaderboard
from quantlab.report.matrix.columns import columns
from quantlab.report.matrix.csv_file import to_csv
from quantlab.report.matrix.html import to_html
from quantlab.report.matrix.layer_maps import group_maps
from quantlab.report.matrix.matrix import build_matrix
from quantlab.report.matrix.row_verdicts import verdicts
from quantlab.report.matrix.rows import task_labels
from quantlab.report.matrix.table_cells import cell
from tests.report.conftest import make_task, measured

LOSSES = {"quiz accuracy seed 0": 0.05, "quiz accuracy seed 1": 0.0, "quiz exact_match seed 0": 0.02, "words": 0.1}


@pytest.fixture
def records(recipe: list[Record]) -> list[Record]:
    def answered(record: Record, *, is_baseline: bool) -> Record:
        tasks = []
        for label, loss in LOSSES.items():
            name, metric, *_ = [*label.split(" "), "accuracy"]
            task = make_task(
                name, 0.8 if is_baseline else 0.8 - loss, None if is_baseline else loss, p=0.001 if loss else 0.9
            )
            groups = {"short": measured(0.8 - loss, 0.1, 60)} if name == "quiz" else {}
            seed = int(label[-1]) if "seed" in label else 0
            tasks.append(task.model_copy(update={"metric": metric, "seed": seed, "by_group": groups}))
        return record.model_copy(update={"tasks": tuple(tasks)})

    return [answered(recipe[0], is_baseline=True), answered(recipe[4], is_baseline=False)]


def test_labels_say_no_more_than_they_must(records: list[Record]) -> None:
    assert list(task_labels(records[0].tasks).values()) == list(LOSSES)
    assert list(task_labels(records[0].tasks[1:2]).values()) == ["quiz"]


def test_every_table_keeps_them_apart(records: list[Record]) -> None:
    matrix = build_matrix(records)
    by_key = {column.key: column for column in columns(matrix)}
    shown = {key: cell(matrix, matrix.rows[1], column) for key, column in by_key.items() if key.startswith("task_")}
    (line,) = list(csv.DictReader(io.StringIO(to_csv(matrix))))[1:]
    page = to_html(matrix)
    for label, loss in LOSSES.items():
        assert shown[f"task_loss.{label}"].number == loss
        assert shown[f"task_score.{label}"].number == 0.8 - loss
        assert shown[f"task_loss.{label}"].verdict == ("loss" if loss else "no measurable loss")
        assert float(line[f"task_loss_{label.replace(' ', '_')}"]) == loss
        assert float(line[f"task_score_{label.replace(' ', '_')}"]) == 0.8 - loss
        assert f"{label}: loss, points" in page
    found = verdicts(matrix.rows[1])
    assert {f"task {label}": found[f"task {label}"] for label in LOSSES} == {
        f"task {label}": "loss" if loss else "no measurable loss" for label, loss in LOSSES.items()
    }
    maps = {found.caption: dict(found.lines)["w4a16"][0].text for found in group_maps(matrix)}
    assert maps == {
        f"{label} by group": f"{100 * (0.8 - loss):.1f}" for label, loss in LOSSES.items() if "quiz" in label
    }


def test_a_comparison_and_a_leaderboard_keep_them_apart(records: list[Record]) -> None:
    (pair,) = compare([(Path("a"), records[0])], [(Path("b"), records[1])], names=("a", "b")).pairs
    found = {number.key: number for number in pair.numbers}
    for label, loss in LOSSES.items():
        assert found[f"task_score.{label}"].difference is not None
        assert found[f"task_score.{label}"].difference.value == pytest.approx(-loss)
    board = build_leaderboard([("run", [(record.variant, record) for record in records])])
    assert [place.row.variant for place in board.places] == ["w4a16"]
