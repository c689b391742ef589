"""Held-out text of datasets: the documents of a corpus by another way, kept in the run's directory."""

import json
from pathlib import Path

import pytest

from quantlab.errors import EvaluationError, RecipeError
from quantlab.evaluation.held_out import DrawnHeldOut, draw_held_out
from quantlab.evaluation.quality.windows import held_out_text, read_corpus
from quantlab.evaluation.suite import load_suite
from quantlab.texts.locate import Commits

MIX = "mix: [{dataset: code.jsonl, share: 0.5}, {dataset: prose.jsonl, share: 0.5}], documents: 16"


@pytest.fixture
def drawn_suite(suite: Path) -> Path:
    """The tiny suite with its corpus as two datasets, one per domain."""
    for domain in ("code", "prose"):
        documents = [one for one in read_corpus(suite.parent / "heldout.jsonl") if one.domain == domain]
        content = "".join(json.dumps({"text": one.text}) + "\n" for one in documents)
        (suite.parent / f"{domain}.jsonl").write_text(content)
    suite.write_text(suite.read_text().replace("corpus: heldout.jsonl", MIX))
    return suite


def draw(suite: Path, checkpoint: Path) -> DrawnHeldOut:
    run = suite.parent / "run"
    drawn = draw_held_out(load_suite(suite), checkpoint, run, Commits(run))
    assert drawn is not None
    return drawn


def test_a_corpus_is_not_drawn(suite: Path, model: Path) -> None:
    assert draw_held_out(load_suite(suite), model, suite.parent / "run", Commits(suite.parent / "run")) is None


def test_datasets_give_the_windows_of_a_corpus(drawn_suite: Path, model: Path, suite: Path) -> None:
    drawn = draw(drawn_suite, model)
    assert not drawn.path.exists()
    drawn.keep()
    loaded = load_suite(drawn_suite, held_out=drawn.path)
    found = held_out_text(loaded, model)
    assert found.domains == ("code.jsonl train", "prose.jsonl train")
    corpus = {(one.domain, one.text) for one in read_corpus(suite.parent / "heldout.jsonl")}
    assert {(one.domain.partition(".")[0], one.text) for one in read_corpus(drawn.path)} == corpus
    assert found.tokens > 0
    sources = json.loads(drawn.path.with_suffix(".sources.json").read_text())
    assert [one["dataset"] for one in sources] == ["code.jsonl", "prose.jsonl"]
    assert all(len(one["commit"]) == 64 for one in sources)


def test_the_same_documents_again_and_from_what_is_kept(
    drawn_suite: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = draw(drawn_suite, model)
    assert draw(drawn_suite, model).content == first.content
    first.keep()
    monkeypatch.setattr("quantlab.evaluation.held_out.documents", None)  # now only the file can be read
    assert draw(drawn_suite, model).content == first.content


def test_the_hash_of_a_suite_is_that_of_the_drawn_text(drawn_suite: Path, model: Path) -> None:
    first = draw(drawn_suite, model)
    first.keep()
    before = load_suite(drawn_suite, held_out=first.path).sha256
    assert load_suite(drawn_suite, held_out=first.path).sha256 == before
    code = drawn_suite.parent / "code.jsonl"
    code.write_text(code.read_text().replace("return", "yield"))
    second = draw(drawn_suite, model)
    assert second.path != first.path
    second.keep()
    assert load_suite(drawn_suite, held_out=second.path).sha256 != before


def test_too_few_documents(drawn_suite: Path, model: Path) -> None:
    drawn_suite.write_text(drawn_suite.read_text().replace("documents: 16", "documents: 17"))
    with pytest.raises(EvaluationError) as raised:
        draw(drawn_suite, model)
    assert raised.value.what == "the held-out text has too few documents"
    assert "code.jsonl" in str(raised.value.where)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("length: 24", "no text is named"),
        ("dataset: a.jsonl, special_tokens: text", "held-out text is read as models read it"),
        ("corpus: a.jsonl, split: test", "`split` belongs to a text named by `dataset`"),
    ],
)
def test_a_suite_that_names_no_text(drawn_suite: Path, text: str, what: str) -> None:
    content = drawn_suite.read_text().replace(f"{MIX}, length: 24", text)
    drawn_suite.write_text(content)
    with pytest.raises(RecipeError) as raised:
        load_suite(drawn_suite)
    assert raised.value.what.startswith(what)
