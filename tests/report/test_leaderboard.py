"""A leaderboard shows its records' numbers, gives only ranks that intervals support, and mixes no incomparable records."""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from quantlab.errors import ArtifactError
from quantlab.evaluation.record import Record, TaskResult
from quantlab.report.leaderboard.files import write_leaderboard
from quantlab.report.leaderboard.leaderboard import Leaderboard, build_leaderboard
from quantlab.report.leaderboard.terminal import print_leaderboard
from tests.report.conftest import measured

Make = Callable[..., Record]


def board_of(*runs: list[Record]) -> Leaderboard:
    return build_leaderboard(
        [
            (f"runs/{'abc'[index]}", [(f"{record.variant}.json", record) for record in run])
            for index, run in enumerate(runs)
        ]
    )


def write_run(directory: Path, records: list[Record]) -> Path:
    (directory / "records").mkdir(parents=True)
    for record in records:
        (directory / "records" / f"{record.variant}.json").write_text(record.model_dump_json())
    return directory


def test_ranks_go_no_further_than_the_intervals(recipe: list[Record], constructed: Make) -> None:
    rows = [
        constructed("worst", loss=(2, 1), rise=(2, 1), kl=0.09),
        constructed("best", loss=(9, 1), rise=(9, 1), kl=0.001),
        constructed("close", loss=(2, 1), rise=(2, 1), kl=0.021),
        constructed("second", loss=(2, 1), rise=(2.5, 1), kl=0.02),
    ]
    board = board_of([recipe[0], *rows])
    assert [(place.row.variant, place.rank) for place in board.places] == [
        ("best", "1"),
        ("second", "2–3"),
        ("close", "2–3"),
        ("worst", "4"),
    ]
    assert [place.row.variant for place in board.unranked] == ["source"]


def test_runs_keep_apart_and_the_baseline_stands_once(recipe: list[Record], constructed: Make) -> None:
    board = board_of(recipe, [recipe[0], recipe[4], constructed("new", loss=(0, 1), rise=(0, 1))])
    names = [place.row.variant for place in (*board.places, *board.unranked)]
    assert names.count("source") == 1
    assert {"a/w4a16", "b/w4a16", "new", "int8"} <= set(names)
    assert len(names) == len(set(names)) == len(recipe) + 2


@pytest.mark.parametrize(
    ("field", "label"),
    [
        ("suite", "suite"),
        ("suite_sha256", "contents of the suite"),
        ("baseline", "baseline"),
        ("baseline_sha256", "artifact of the baseline"),
    ],
)
def test_mixtures_are_refused_with_both_names(recipe: list[Record], field: str, label: str) -> None:
    other = [record.model_copy(update={field: "other"}) for record in recipe]
    with pytest.raises(ArtifactError, match=f"differ in the {label} cannot") as caught:
        board_of(recipe, other)
    assert caught.value.where == "source of runs/b and source of runs/a"
    assert "`other`" in str(caught.value.found)


def test_tasks_of_two_versions_are_refused(recipe: list[Record]) -> None:
    def with_task(version: str) -> list[Record]:
        task = TaskResult(name="words", version=version, metric="accuracy", score=measured(0.5, 0.02, 500), n=500)
        return [recipe[0], recipe[4].model_copy(update={"tasks": (task,)})]

    assert len(board_of(with_task("1"), with_task("1")).places) == 2
    with pytest.raises(ArtifactError, match="differ in the version of the task words") as caught:
        board_of(with_task("1"), with_task("2"))
    assert caught.value.where == "w4a16 of runs/b and w4a16 of runs/a"
    assert caught.value.found == "`2` and `1`"


def test_machines_have_columns_of_their_own(recipe: list[Record], tmp_path: Path) -> None:
    other = [record.model_copy(update={"hardware": "a GPU"}) for record in recipe]
    write_leaderboard([write_run(tmp_path / "a", recipe), write_run(tmp_path / "b", other)], tmp_path / "out")
    head = (tmp_path / "out" / "leaderboard.md").read_text().split("\n| ")[1]
    assert "speed × FP16 (AMD EPYC 9354P, 2 cores, 8 GB)" in head
    assert "speed × FP16 (a GPU)" in head
    assert head.count("memory % of FP16") == 1
    line = next(line for line in (tmp_path / "out" / "leaderboard.md").read_text().splitlines() if "`b/w4a16`" in line)
    speeds = [cell.strip() for cell in line.split("|")[5:7]]
    assert speeds == ["–", "2.61 (2.55 to 2.67)"]


def test_files_hold_every_record_and_links_that_resolve(recipe: list[Record], tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", recipe), write_run(tmp_path / "b", recipe)
    out = tmp_path / "out"
    board = write_leaderboard([a, b, a], out)
    assert sorted(path.name for path in out.iterdir()) == [
        f"leaderboard.{end}" for end in ("csv", "html", "json", "md")
    ]
    kept = json.loads((out / "leaderboard.json").read_text())
    assert kept.keys() >= {"schema", "suite", "suite_sha256", "baseline", "baseline_sha256", "hardware"}
    assert [place["row"]["variant"] for place in kept["places"]] == [place.row.variant for place in board.places]
    assert [(place["best"], place["worst"], place["run"]) for place in kept["unranked"]] == [(0, 0, str(a))]
    lines = list(csv.DictReader(io.StringIO((out / "leaderboard.csv").read_text())))
    assert len(lines) == 2 * len(recipe) - 1
    for line in lines:
        record = Record.model_validate_json((out / line["record"]).read_bytes())
        assert line["variant"].endswith(record.variant)
        if record.quality and record.quality.accuracy_loss_percent:
            assert float(line["accuracy_loss_percent"]) == record.quality.accuracy_loss_percent.value
    console = Console(file=io.StringIO(), width=140)
    print_leaderboard(board, console)
    assert "b/w4a16" in console.file.getvalue()


def test_links_resolve_whatever_a_run_is_called(recipe: list[Record], tmp_path: Path) -> None:
    run, other = (write_run(tmp_path / name, recipe) for name in ("a [1] (x)|50% #2?`q=1`", 'b"><i>'))
    out = tmp_path / "out"
    write_leaderboard([run, other], out)
    html = (out / "leaderboard.html").read_text()
    markdown = (out / "leaderboard.md").read_text()
    assert "<i>" not in html
    rendered = MarkdownIt("commonmark").enable("table").render(markdown)
    for links, count in (
        (re.findall('<a class="value" href="([^"]*)"', html), 200),
        (re.findall('<a href="([^"]*)">record<', html), 15),
        (re.findall('<a href="([^"]*)">record<', rendered), 15),
    ):
        assert len(links) >= count
        for link in links:
            assert Record.model_validate_json((out / unquote(urlsplit(link).path)).read_bytes())
    assert {line.count("<td") for line in rendered.split("<tr>")[2:]} == {11}


def test_a_refused_leaderboard_writes_nothing(recipe: list[Record], tmp_path: Path) -> None:
    other = [record.model_copy(update={"suite_sha256": "0" * 64}) for record in recipe]
    with pytest.raises(ArtifactError):
        write_leaderboard([write_run(tmp_path / "a", recipe), write_run(tmp_path / "b", other)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
