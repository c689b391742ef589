"""`quantlab report` rebuilds the tables of the kept records byte for byte."""

import json
from pathlib import Path

import pytest

from quantlab.evaluation.record import Record
from tests.benchmarks.keep_records import TABLE, keep, report

ROOT = Path(__file__).parents[2]
KEPT = sorted(path.parent for path in (ROOT / "eval" / "results").glob("*/records"))


def differing(place: Path, directory: Path) -> list[str]:
    """Files of the kept table that differ from a new report."""
    report(place, directory)
    return [name for name in TABLE if (directory / name).read_bytes() != (place / name).read_bytes()]


@pytest.mark.parametrize("place", KEPT, ids=lambda place: place.name)
def test_every_kept_table_is_made_again(place: Path, tmp_path: Path) -> None:
    assert differing(place, tmp_path / "again") == []
    for path in (place / "records").glob("*.json"):
        record = json.loads(path.read_bytes())
        assert " /" not in record["command"], "a path of the machine it was measured on"
        assert not record["artifact"].startswith("/")


@pytest.mark.slow
def test_kept_tables_are_reproducible_and_a_changed_number_is_detected(rich: list[Record], tmp_path: Path) -> None:
    run, place = tmp_path / "run", tmp_path / "kept"
    (run / "records").mkdir(parents=True)
    for record in rich:
        (run / "records" / f"{record.variant}.json").write_text(record.model_dump_json())
    (run / "claims.yaml").write_bytes((ROOT / "eval" / "claims" / "guide.yaml").read_bytes())
    keep(run, place)
    assert {path.name for path in place.iterdir()} == {"records", "claims.yaml", *TABLE}
    assert "W4A16 runs at 3.2x" in (place / "matrix.md").read_text()
    assert differing(place, tmp_path / "again") == []
    record = place / "records" / "w4a16.json"
    record.write_text(record.read_text().replace('"value":0.92', '"value":0.93'))
    assert differing(place, tmp_path / "changed") == list(TABLE)
    keep(place, place)
    assert differing(place, tmp_path / "kept again") == []
