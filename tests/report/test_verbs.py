"""The command lines of `report`, `compare` and `leaderboard`, for people and scripts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report.conftest import enrich, make_recipe

GUIDE = Path(__file__).parents[2] / "eval" / "claims" / "guide.yaml"


def quantlab(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quantlab", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "160"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one recipe."""
    root = tmp_path_factory.mktemp("runs")
    for name, records in (("old", make_recipe()), ("new", [enrich(record) for record in make_recipe()])):
        (root / name / "records").mkdir(parents=True)
        for record in records:
            (root / name / "records" / f"{record.variant}.json").write_text(record.model_dump_json())
    return root


def test_report_checks_the_claims_that_lie_beside_the_records(runs: Path) -> None:
    (runs / "new" / "claims.yaml").write_bytes(GUIDE.read_bytes())
    done = quantlab("report", runs / "new")
    assert done.returncode == 0, done.stderr
    for needed in (
        "W4A16 runs at 3.2x",
        "does not hold",
        "loss, pts",
        "No measurable loss: fp16, int8, int8_weight.",
    ):
        assert needed in done.stdout


def test_compare_runs_and_variants(runs: Path) -> None:
    done = quantlab("compare", runs / "old", runs / "new", "--json")
    assert done.returncode == 0, done.stderr
    pairs = json.loads(done.stdout)["pairs"]
    assert len(pairs) == len(make_recipe())
    verdicts = {number["verdict"] for pair in pairs for number in pair["numbers"]}
    assert "A is better" not in verdicts
    assert "B is better" not in verdicts
    shown = quantlab("compare", runs / "new" / "artifacts" / "int8", runs / "new" / "records" / "w4a16.json")
    assert shown.returncode == 0, shown.stderr
    assert "int4_g128 (gptq)" in shown.stdout
    assert "B is better" in shown.stdout


@pytest.mark.slow
def test_leaderboard_merges_and_refuses(runs: Path, tmp_path: Path) -> None:
    done = quantlab("leaderboard", runs / "old", runs / "new", "--out", tmp_path / "board")
    assert done.returncode == 0, done.stderr
    assert "new/w4a16" in done.stdout
    assert (tmp_path / "board" / "leaderboard.html").is_file()
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.json").write_text(make_recipe()[4].model_copy(update={"suite": "core 1"}).model_dump_json())
    refused = quantlab("leaderboard", runs / "old", other, "--out", tmp_path / "none")
    assert refused.returncode == 1
    assert "records that differ in the suite cannot stand in one column" in refused.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "nothing", "records"), "there is no such file or directory"),
        (("leaderboard", "nothing"), "there is no such file or directory"),
        (("report", "nothing"), "there are no records to report"),
    ],
)
def test_bad_paths_are_told_without_a_traceback(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    verb, *paths = arguments
    done = quantlab(verb, *(tmp_path / path for path in paths))
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_record_of_another_version_is_named_with_its_field(runs: Path, tmp_path: Path) -> None:
    record = json.loads((runs / "old" / "records" / "w4a16.json").read_text())
    path = tmp_path / "future.json"
    path.write_text(json.dumps(record | {"schema_version": 2}))
    done = quantlab("compare", runs / "old" / "records" / "int8.json", path)
    assert done.returncode == 1
    assert "not a record of this version" in done.stderr
    assert "schema_version" in done.stderr
