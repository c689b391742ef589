"""Datasets of a hub: the commit, the same rows every time, and what the hub refuses. The hub is one on the loopback address."""

import json
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub.constants
import pytest
from typer.testing import CliRunner

from quantlab.cli import app
from quantlab.errors import ArtifactError, CalibrationError
from quantlab.recipe.presets import PRESETS, with_preset
from quantlab.recipe.texts import LocatedText, MixedSource, TextSource
from quantlab.texts.locate import Commits, locate
from quantlab.texts.rows import Reading, documents
from tests.fake_hub import FakeHub


def located(checkpoint: Path, *sources: TextSource, run: Path = Path("/nonexistent")) -> LocatedText:
    return locate(sources, lambda path: checkpoint / path, checkpoint, commits=Commits(run), error=CalibrationError)


def read(checkpoint: Path, *, seed: int = 0, **fields: Any) -> list[str]:
    text = located(checkpoint, TextSource(**fields))
    reading = Reading(text.sources[0], {}, (), seed, CalibrationError)
    return ["".join(piece.text for piece in document) for document in documents(reading)]


def test_a_revision_is_pinned_to_its_commit_and_read_alike(hub: FakeHub, checkpoint: Path) -> None:
    by_branch = located(checkpoint, TextSource(dataset="me/text", split="train_sft"))
    assert by_branch.sources[0].commit == hub.commit("me/text")
    hub.requests.clear()
    pinned = located(checkpoint, TextSource(dataset="me/text", split="train_sft", revision=hub.commit("me/text")))
    assert hub.requests == []  # a commit needs no question
    assert pinned.key == by_branch.key
    first = read(checkpoint, dataset="me/text", split="train_sft")
    assert len(set(first)) == 40
    assert read(checkpoint, dataset="me/text", split="train_sft", revision=hub.commit("me/text")) == first
    assert read(checkpoint, dataset="me/text", split="train_sft", seed=1) != first


def test_a_run_remembers_its_commits(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    commits = Commits(tmp_path / "run")
    commits.of("me/text", None)
    assert not (tmp_path / "run").exists()
    commits.keep()
    before = hub.commit("me/text")
    hub.datasets["me/text"]["new"] = b"x"
    assert hub.commit("me/text") != before
    hub.requests.clear()
    assert Commits(tmp_path / "run").of("me/text", None) == before
    assert hub.requests == []
    assert Commits(tmp_path / "other").of("me/text", "main") == hub.commit("me/text")


def test_the_key_is_what_decides_the_text(checkpoint: Path, hub: FakeHub) -> None:
    sha = "0" * 40
    base = {"dataset": "me/text", "revision": sha, "split": "a"}
    variants: list[dict[str, Any]] = [
        base, base | {"dataset": "me/two"}, base | {"revision": "1" * 40}, base | {"split": "b"}, base | {"config": "c"},
        base | {"column": "x"}, base | {"special_tokens": "text"},
    ]  # fmt: skip
    keys = [located(checkpoint, TextSource(**fields)).key for fields in variants]
    assert len(set(keys)) == len(keys)
    half = MixedSource(**base, share=0.5)
    assert located(checkpoint, half, half).key not in keys
    (checkpoint / "chat_template.jinja").write_text("another")
    assert located(checkpoint, TextSource(**base)).key not in keys


def test_the_key_of_files_is_their_content(checkpoint: Path) -> None:
    folder = checkpoint / "data"
    folder.mkdir()
    (folder / "a.txt").write_text("x")
    first = located(checkpoint, TextSource(dataset="data")).key
    folder.rename(checkpoint / "moved")
    assert located(checkpoint, TextSource(dataset="moved")).key == first
    (checkpoint / "moved" / "a.txt").write_text("y")
    assert located(checkpoint, TextSource(dataset="moved")).key != first


REFUSALS = [
    ({"dataset": "me/none"}, "the hub has no such dataset"),
    ({"dataset": "me/text", "revision": "nope"}, "the hub has no such dataset"),
    ({"dataset": "me/text", "revision": "0" * 40}, "the hub has no such dataset"),
    ({"dataset": "me/text"}, "the dataset has no such split"),
    ({"dataset": "me/script"}, "the dataset is a program that would run on this machine, which quantlab refuses"),
    ({"dataset": "me/two"}, "the dataset has several configurations"),
    ({"dataset": "me/two", "config": "c"}, "the dataset has several configurations"),
    ({"dataset": "nothing"}, "the dataset is not there"),
]


@pytest.mark.parametrize(("fields", "what"), REFUSALS)
def test_a_dataset_that_is_not_there(hub: FakeHub, checkpoint: Path, fields: dict[str, Any], what: str) -> None:
    with pytest.raises(CalibrationError) as raised:
        read(checkpoint, **fields)
    assert raised.value.what == what
    assert str(fields["dataset"]) in str(raised.value.where)
    assert raised.value.found
    assert raised.value.fix


ANSWERS = [
    (401, "", "the hub asks who you are", 1),
    (401, "GatedRepo", "the hub asks who you are", 1),
    (403, "GatedRepo", "the hub refuses access to the dataset", 1),
    (403, "", "the hub refuses access to the dataset", 1),
    (404, "", "the hub has no such dataset", 1),
    (429, "", "the hub answers that there are too many requests", 4),
    (500, "", "the hub cannot answer at the moment", 4),
    (503, "", "the hub cannot answer at the moment", 4),
    (0, "", "the hub cannot be reached", 4),
]


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize(("status", "code", "what", "attempts"), ANSWERS)
def test_a_hub_that_refuses(
    hub: FakeHub, checkpoint: Path, status: int, code: str, what: str, attempts: int, pinned: bool
) -> None:
    hub.fail("me/text", status=status, code=code)
    with pytest.raises(CalibrationError) as raised:
        read(checkpoint, dataset="me/text", split="train_sft", revision=hub.commit("me/text") if pinned else None)
    assert raised.value.what == what
    assert raised.value.fix
    assert len([one for one in hub.requests if "me/text" in one]) == attempts


@pytest.mark.parametrize("status", [429, 503, 0])
def test_a_hub_that_is_busy_for_a_moment(hub: FakeHub, checkpoint: Path, status: int) -> None:
    hub.fail("me/text", status=status, times=2)
    assert len(read(checkpoint, dataset="me/text", split="train_sft")) == 40


@pytest.mark.slow
@pytest.mark.parametrize(("status", "times"), [(503, 3), (429, 3), (0, 3)])
def test_a_connection_that_breaks_while_files_are_read(
    hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, status: int, times: int
) -> None:
    """The libraries try again; afterwards the error is one that says what to do."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 2)
    whole = read(checkpoint, dataset="me/text", split="train_sft")
    hub.fail("me/text", status=status, times=times, path="train_sft-1.parquet")
    assert read(checkpoint, dataset="me/text", split="train_sft") == whole
    hub.fail("me/text", status=status, path="train_sft-1.parquet")
    with pytest.raises(CalibrationError) as raised:
        read(checkpoint, dataset="me/text", split="train_sft")
    assert raised.value.what.startswith("the hub ")
    assert raised.value.fix


def test_a_damaged_list_of_commits(tmp_path: Path) -> None:
    path = tmp_path / "texts" / "commits.json"
    path.parent.mkdir()
    for content in ("{", "[]"):
        path.write_text(content)
        with pytest.raises(ArtifactError, match="remove the file"):
            Commits(tmp_path)


def test_the_command_that_lists_presets() -> None:
    shown = CliRunner().invoke(app, ["datasets"]).output
    assert all(name in shown and preset.dataset in shown for name, preset in PRESETS.items())
    listed = json.loads(CliRunner().invoke(app, ["datasets", "--json"]).output)
    assert listed["c4"]["revision"] == PRESETS["c4"].revision


def test_no_network(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for revision in (None, hub.commit("me/text")):
        with pytest.raises(CalibrationError) as raised:
            read(checkpoint, dataset="me/text", split="train_sft", revision=revision)
        assert raised.value.what == "the dataset is not on this machine, and the hub may not be asked"
    assert not [one for one in hub.requests if "me/text" in one]


def test_a_cached_dataset_of_another_commit_is_not_taken_for_it(
    hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets.load_dataset("me/text", split="train_sft")  # into the cache
    commit = hub.commit("me/text")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert len(read(checkpoint, dataset="me/text", split="train_sft", revision=commit)) == 40
    with pytest.raises(CalibrationError, match="may not be asked") as raised:
        read(checkpoint, dataset="me/text", split="train_sft", revision="0" * 40)
    assert commit in str(raised.value.found)


def test_presets_are_pinned_and_can_be_overridden(checkpoint: Path, tmp_path: Path) -> None:
    assert {"ultrachat", "wikitext", "c4", "pile-10k", "openr1", "numina", "code", "multilingual"} == set(PRESETS)
    for name, preset in PRESETS.items():
        assert len(preset.revision) == 40
        source = located(checkpoint, TextSource(dataset=name)).sources[0]  # asks no hub
        assert (source.source.dataset, source.commit, source.source.split) == (
            preset.dataset,
            preset.revision,
            preset.split,
        )
    other = with_preset(TextSource(dataset="c4", config="realnewslike", split="validation"))
    assert (other.config, other.split, other.column) == ("realnewslike", "validation", "text")
