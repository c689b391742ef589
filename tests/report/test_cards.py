"""A model card gets the numbers of its own measured artifact, in its marked section."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from quantlab.cli import app
from quantlab.errors import ArtifactError
from quantlab.evaluation.record import Record
from quantlab.report.files import write_report
from quantlab.report.matrix.model_cards import END, START
from quantlab.run.model_card import MEASURED_END, MEASURED_START

BEFORE, AFTER = "# w4a16\n\n## Measurements\n\n", "\n## Loading\n\n- as you like\n"


@pytest.fixture
def run(rich: list[Record], tmp_path: Path) -> tuple[list[Record], Path]:
    """Records whose w4a16 has an artifact with a card."""
    artifact = tmp_path / "artifacts" / "w4a16"
    artifact.mkdir(parents=True)
    (artifact / "README.md").write_text(f"{BEFORE}{START}\nNot measured yet.\n{END}\n{AFTER}")
    (artifact / "manifest.json").write_text(json.dumps({"files": {"config.json": {}}}))
    return [at_home(record, artifact) for record in rich], artifact


def at_home(record: Record, artifact: Path) -> Record:
    digest = hashlib.sha256((artifact / "manifest.json").read_bytes()).hexdigest()
    return record.model_copy(update={"artifact_sha256": digest}) if record.variant == artifact.name else record


def test_both_sides_agree_on_the_place() -> None:
    assert (START, END) == (MEASURED_START, MEASURED_END)


def test_the_row_stands_in_its_place(run: tuple[list[Record], Path]) -> None:
    records, artifact = run
    write_report(records, artifact.parents[1])
    card = (artifact / "README.md").read_text()
    assert card.startswith(BEFORE + START)
    assert card.endswith(f"{END}\n{AFTER}")
    assert "Not measured yet" not in card
    tokens = MarkdownIt("commonmark").enable("table").parse(card)
    assert "table_open" in [token.type for token in tokens]
    for needed in (
        "0.92 (0.61 to 1.23)",
        "34.9",
        "2.61 (2.55 to 2.67)",
        "65,536",
        "loss: accuracy",
        "continuation",
        "AMD EPYC",
    ):
        assert needed in card
    write_report(records, artifact.parents[1])
    assert (artifact / "README.md").read_text() == card


@pytest.mark.parametrize("spoiled", ["markers", "hashed", "elsewhere"])
def test_other_cards_are_left_alone(run: tuple[list[Record], Path], spoiled: str) -> None:
    records, artifact = run
    if spoiled == "markers":
        (artifact / "README.md").write_text(BEFORE + START + "\nmine now\n" + AFTER)
    elif spoiled == "hashed":
        (artifact / "manifest.json").write_text(json.dumps({"files": {"README.md": {}}}))
        records = [at_home(record, artifact) for record in records]
    else:
        records = [record.model_copy(update={"artifact": "../elsewhere"}) for record in records]
    before = (artifact / "README.md").read_bytes()
    write_report(records, artifact.parents[1])
    assert (artifact / "README.md").read_bytes() == before


def test_an_artifact_changed_since_its_record_is_refused(run: tuple[list[Record], Path]) -> None:
    records, artifact = run
    (artifact / "manifest.json").write_text("{}")
    with pytest.raises(ArtifactError, match="changed since it was measured") as caught:
        write_report(records, artifact.parents[1])
    assert str(caught.value.where).endswith("artifacts/w4a16/manifest.json")
    assert [path.name for path in artifact.parents[1].iterdir()] == ["artifacts"]


def test_the_verb_refuses_an_artifact_whose_shards_are_not_those_of_the_record(run: tuple[list[Record], Path]) -> None:
    records, artifact = run
    shard = artifact / "model.safetensors"
    shard.write_bytes(b"as measured")
    files = {shard.name: {"sha256": hashlib.sha256(b"as measured").hexdigest(), "bytes": 11}}
    (artifact / "manifest.json").write_text(json.dumps({"files": files}))
    out = artifact.parents[1]
    (out / "records").mkdir()
    for record in (at_home(record, artifact) for record in records):
        (out / "records" / f"{record.variant}.json").write_text(record.model_dump_json())
    assert CliRunner().invoke(app, ["report", str(out)]).exit_code == 0
    shard.write_bytes(b"as replaced")
    os.utime(shard, (2e9, 2e9))
    refused = CliRunner().invoke(app, ["report", str(out)])
    assert isinstance(refused.exception, ArtifactError)
    assert str(refused.exception.where) == str(shard)
