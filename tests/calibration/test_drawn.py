"""Samples drawn from datasets: shares, the kept documents, and the same tokens as from a corpus with the same documents."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab.calibration.corpus import sample_tokens
from quantlab.calibration.drawn import DrawnText, draw_text
from quantlab.errors import ArtifactError, CalibrationError
from quantlab.recipe.schema import Calibration
from quantlab.texts.locate import Commits, locate
from tests.texts.conftest import checkpoint, words  # noqa: F401 - a fixture


def write(path: Path, documents: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def draw(directory: Path, **fields: Any) -> DrawnText:
    calibration = Calibration(**({"samples": 12, "length": 9} | fields))
    located = locate(
        calibration.sources,
        lambda path: directory / path,
        directory / "checkpoint",
        commits=Commits(directory / "run"),
        error=CalibrationError,
    )
    return draw_text(located, calibration, directory / "checkpoint", directory / "run")


@pytest.fixture
def files(checkpoint: Path, tmp_path: Path) -> Path:  # noqa: F811
    """Documents of 30 words, of 3 words, and one of both sizes."""
    write(tmp_path / "long.jsonl", [words(30 * n, 30) for n in range(16)])
    write(tmp_path / "short.jsonl", [words(3 * n, 3) for n in range(120)])
    return tmp_path


def test_shares_are_exact(files: Path) -> None:
    mix = [{"dataset": "long.jsonl", "share": 0.3}, {"dataset": "short.jsonl", "share": 0.7}]
    found = draw(files, mix=mix)
    assert found.tokens.shape == (12, 9)
    assert found.tokens.dtype == torch.int64
    assert found.samples == (4, 8)
    assert [(one["samples"], one["tokens"]) for one in found.written()["sources"]] == [(4, 36), (8, 72)]
    long = {tuple(range(10 + 30 * n, 40 + 30 * n)) for n in range(16)}
    for sample in found.tokens[:4].tolist():
        assert sample[0] == 1
        assert any(sample[1] in document and sample[8] in document for document in long)
    assert sum(one.source == 0 for one in found.documents) == 4  # no row beyond those needed


def test_a_share_that_gives_no_sample(files: Path) -> None:
    mix = [{"dataset": "long.jsonl", "share": 0.99}, {"dataset": "short.jsonl", "share": 0.01}]
    with pytest.raises(CalibrationError, match="gives no sample"):
        draw(files, mix=mix)


def test_the_same_samples_again_and_from_what_is_kept(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = draw(files, dataset="short.jsonl")
    assert not (files / "run").exists()
    again = draw(files, dataset="short.jsonl")
    assert torch.equal(first.tokens, again.tokens)
    assert first.content == again.content
    assert not torch.equal(first.tokens, draw(files, dataset="short.jsonl", seed=1).tokens)
    first.keep()
    assert first.path.read_bytes() == first.content
    monkeypatch.setattr("quantlab.calibration.drawn.documents", None)  # now only the file can be read
    from_file = draw(files, dataset="short.jsonl")
    assert torch.equal(from_file.tokens, first.tokens)
    assert from_file.written() == first.written()


def test_what_is_kept_belongs_to_its_key(files: Path) -> None:
    paths = {draw(files, dataset="short.jsonl").path}
    for fields in ({"samples": 11}, {"length": 8}, {"seed": 1}, {"special_tokens": "text"}):
        paths.add(draw(files, **({"dataset": "short.jsonl"} | fields)).path)
    paths.add(draw(files, dataset="long.jsonl").path)
    assert len(paths) == 6


def test_a_damaged_file_is_no_text(files: Path) -> None:
    first = draw(files, dataset="short.jsonl")
    first.keep()
    first.path.write_text('{"source": 0}\n')
    with pytest.raises(ArtifactError, match="the kept calibration text is damaged"):
        draw(files, dataset="short.jsonl")


def test_all_windows_of_long_documents_can_be_drawn(files: Path) -> None:
    """When the rows end, second windows of the documents are taken, as from a corpus."""
    drawn = draw(files, dataset="long.jsonl", samples=48).tokens
    corpus = sample_tokens(files / "long.jsonl", files / "checkpoint", samples=48, length=9, seed=0)
    assert len(drawn.unique(dim=0)) == len(corpus.unique(dim=0)) == 48
    assert (drawn[:, 2:] - drawn[:, 1:-1] == 1).all()


def test_too_little_text_says_of_which_source(files: Path) -> None:
    with pytest.raises(CalibrationError) as raised:
        draw(files, dataset="long.jsonl", samples=400)
    assert raised.value.what == "the calibration text is too short"
    assert "long.jsonl" in str(raised.value.where)
    with pytest.raises(CalibrationError, match="too short to hold text"):
        draw(files, dataset="long.jsonl", length=1)
