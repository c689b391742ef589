"""A suite's text and tasks tried with a tokenizer before anything is measured."""

import json
from pathlib import Path

import pytest

from quantlab.errors import CheckpointError, EvaluationError, QuantlabError
from quantlab.evaluation.suite import load_suite
from quantlab.evaluation.text import check_suite_text

TASK = """
name: few
version: 1
kind: choice
items: few.jsonl
metrics: [accuracy]
random_baseline: 0.5
description: made up
"""
CONTEXT = 256
ROOT = Path(__file__).parent.parent.parent


def check(suite: Path, directory: Path, context: int = CONTEXT) -> None:
    check_suite_text(load_suite(suite), directory, context)


def refusal(suite: Path, directory: Path, kind: type[QuantlabError] = EvaluationError, context: int = CONTEXT) -> str:
    with pytest.raises(kind) as raised:
        check(suite, directory, context)
    assert raised.value.where
    assert raised.value.found
    assert raised.value.fix
    return str(raised.value)


def test_windows_as_long_as_the_context_fit(suite: Path, model: Path) -> None:
    suite.write_text(suite.read_text().replace("length: 24", "length: 65"))
    check(suite, model, context=65)
    check(suite, model, context=0)  # config.json does not say
    assert "a window of held-out text is longer" in refusal(suite, model, context=64)


def test_a_million_tokens_are_refused_whatever_the_model(suite: Path, model: Path) -> None:
    suite.write_text(suite.read_text().replace("length: 24", "length: 1000000"))
    with pytest.raises(QuantlabError, match="a value out of range"):
        load_suite(suite)


def test_a_greedy_continuation_needs_room_for_a_prompt(suite: Path, model: Path) -> None:
    suite.write_text(suite.read_text() + "served: {greedy_tokens: 99}\n")
    check(suite, model, context=100)
    assert "a prompt with its greedy continuation is longer" in refusal(suite, model, context=99)


def test_a_timed_decode_fits_into_the_context_of_the_model_that_is_timed(suite: Path, model: Path) -> None:
    suite.write_text(suite.read_text().replace("prompt: 4", "prompt: 254"))
    check(suite, model, context=100)  # the shape of the suite has 256
    suite.write_text(suite.read_text().replace("prompt: 254", "prompt: 255"))
    assert "a timed decode is longer" in refusal(suite, model, context=300)
    before, _ = suite.read_text().split("speed:")
    suite.write_text(before + "speed: {prompt: 99, steps: 1}\n")
    check(suite, model, context=100)
    assert "a timed decode is longer" in refusal(suite, model, context=99)


def test_held_out_text_that_cannot_be_scored(suite: Path, model: Path) -> None:
    corpus = suite.parent / "heldout.jsonl"
    whole = corpus.read_bytes()
    for content, what in (
        (b"", "the held-out text is empty"),
        (b"\n\n", "the held-out text is empty"),
        (whole.split(b"\n")[0], "a domain has too few documents"),
        (whole.decode().encode("latin-1", errors="replace"), "the held-out text cannot be read"),
        (whole.decode().encode("utf-16"), "the held-out text cannot be read"),
        (whole + b'{"domain": "prose", "text": null}\n', "has no text"),
        (whole + b'{"domain": "prose", "text": 7}\n', "has no text"),
        (whole + b'{"domain": null, "text": "x"}\n', "has no domain"),
        (whole + b'{"domain": "prose", "text": "x\\ud800"}\n', "is not valid Unicode"),
        (whole + b'{"domain": "\\udfff", "text": "x"}\n', "is not valid Unicode"),
    ):
        corpus.write_bytes(content)
        assert what in refusal(suite, model)


def test_a_byte_order_mark_and_blank_lines_change_nothing(suite: Path, model: Path) -> None:
    corpus = suite.parent / "heldout.jsonl"
    corpus.write_bytes(b"\xef\xbb\xbf" + corpus.read_bytes().replace(b"\n", b"\r\n\r\n") + b"\n")
    check(suite, model)


def test_a_tokenizer_that_cannot_be_used(suite: Path, tmp_path: Path) -> None:
    assert "the checkpoint has no tokenizer" in refusal(suite, tmp_path, CheckpointError)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    assert "the tokenizer cannot be read" in refusal(suite, tmp_path, CheckpointError)


@pytest.mark.parametrize(
    ("item", "what"),
    [
        ({"context": "the sun " * 60}, "an item is longer than the model's context"),
        ({"context": "", "choices": ["<bos>", "rose"]}, "an item cannot be scored"),
    ],
)
def test_items_are_encoded(suite: Path, model: Path, item: dict[str, object], what: str) -> None:
    good = {"id": 0, "document": "d", "context": "the sun", "choices": [" rose", " spoke"], "answer": 0}
    (suite.parent / "few.yaml").write_text(TASK)
    suite.write_text(suite.read_text() + "tasks: [{task: few.yaml}]\n")
    items = suite.parent / "few.jsonl"
    items.write_bytes(b"\xef\xbb\xbf\n" + json.dumps(good).encode() + b"\n\n")
    check(suite, model, context=100)
    items.write_text("\n" + json.dumps(good | item) + "\n")
    assert what in refusal(suite, model, context=100)
    items.write_text("\n\n" + json.dumps(good | {"choices": ["\ud800", "x"]}) + "\n")
    with pytest.raises(EvaluationError, match="an item is malformed") as raised:
        load_suite(suite)
    assert str(raised.value.where).endswith("few.jsonl:3")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quick", "guide", "core", "long_context", "reasoning"])
def test_every_suite_fits_the_reference_checkpoint(name: str) -> None:
    check(ROOT / "eval" / "suites" / f"{name}.yaml", ROOT / "eval" / "reference" / "deepseek-v3-mini", context=2048)
