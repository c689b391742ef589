"""`run` and `eval` try the text of a recipe before the first block: a mistake costs seconds and leaves nothing behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantlab.cli import app
from quantlab.errors import QuantlabError
from tests.checkpoints import make_checkpoint
from tests.evaluation.conftest import TINY_SUITE, write_corpus, write_tokenizer

RECIPE = """
model: model
calibration: {corpus: calibration.jsonl, samples: 4, length: 16}
variants:
  a: [{quantize: int4_g128, algorithm: {name: gptq}}]
evaluate: {suite: tiny.yaml}
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    write_tokenizer(make_checkpoint(root / "model", "llama"))
    write_corpus(root / "calibration.jsonl")
    write_corpus(root / "heldout.jsonl", seed=1)
    shape = (root / "model" / "config.json").read_text().replace("\n", " ")
    (root / "tiny.yaml").write_text(TINY_SUITE.format(corpus="heldout.jsonl", shape=shape))
    (root / "recipe.yaml").write_text(RECIPE)
    return root


@pytest.fixture
def files(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with everything it names. Work on its artifacts is an error."""
    monkeypatch.setattr("quantlab.stages.make_artifacts", _unexpected)
    return shutil.copytree(whole, tmp_path / "files")


class _WorkBeganError(Exception):
    pass


def _unexpected(*_: object) -> None:
    raise _WorkBeganError


def outcome(files: Path, verb: str = "run") -> BaseException | None:
    out = files / "out"
    result = CliRunner().invoke(app, [verb, str(files / "recipe.yaml"), "--out", str(out), "--device", "cpu"])
    assert result.exit_code > 0
    assert not out.exists()
    return result.exception


def changed(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(files: Path) -> None:
        text = (files / name).read_text()
        assert old in text
        (files / name).write_text(text.replace(old, new, 1))

    return change


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda files: (files / name).write_bytes(content.encode() if isinstance(content, str) else content) and None


def config(**fields: object) -> Callable[[Path], None]:
    def change(files: Path) -> None:
        path = files / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


MISTAKES = [
    (changed("recipe.yaml", "length: 16", "length: 257"), "a calibration sample is longer than the model's context"),
    (changed("recipe.yaml", "length: 16", "length: 1000000"), "a value out of range"),
    (changed("recipe.yaml", "samples: 4", "samples: 40000"), "the calibration text is too short"),
    (changed("recipe.yaml", "corpus: calibration", "corpus: nothing"), "the calibration text cannot be read"),
    (written("calibration.jsonl", '{"text": "\\ud800"}'), "a line of the calibration text is not valid Unicode"),
    (written("calibration.jsonl", b'{"text": "caf\xe9"}'), "the calibration text cannot be read"),
    (changed("tiny.yaml", "length: 24", "length: 257"), "a window of held-out text is longer than the model's context"),
    (written("heldout.jsonl", ""), "the held-out text is empty"),
    (written("heldout.jsonl", '{"domain": "a", "text": "one"}'), "a domain has too few documents"),
    (
        written("heldout.jsonl", '{"domain": "a", "text": "\\udfff"}'),
        "a line of the held-out text is not valid Unicode",
    ),
    (written("heldout.jsonl", '{"domain": "a", "text": null}'), "a line of the held-out text has no text"),
    (written("heldout.jsonl", b'{"domain": "a", "text": "caf\xe9"}'), "the held-out text cannot be read"),
    (lambda files: (files / "model" / "tokenizer.json").unlink(), "the checkpoint has no tokenizer"),
    (written("model/tokenizer.json", '{"version": "1.0", "trunc'), "the tokenizer cannot be read"),
    (written("model/tokenizer_config.json", "{"), "tokenizer_config.json is not JSON"),
    (written("model/generation_config.json", ""), "generation_config.json is not JSON"),
    (config(eos_token_id=384), "a token is outside the vocabulary"),
    (written("model/generation_config.json", '{"eos_token_id": [1, 384]}'), "an end token is not in the model's"),
]


@pytest.mark.parametrize(("change", "what"), MISTAKES)
def test_a_mistake_is_told_before_the_work(files: Path, change: Callable[[Path], None], what: str) -> None:
    change(files)
    error = outcome(files)
    assert isinstance(error, QuantlabError)
    assert error.what.startswith(what)
    assert error.where
    assert error.found
    assert error.fix


def test_a_recipe_without_mistakes_begins(files: Path) -> None:
    assert isinstance(outcome(files), _WorkBeganError)


def test_a_tokenizer_with_more_tokens_than_the_model(files: Path) -> None:
    path = files / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 384, "content": "<more>"})
    content["model"]["vocab"]["<more>"] = 384
    path.write_text(json.dumps(content))
    error = outcome(files)
    assert isinstance(error, QuantlabError)
    assert error.what == "the tokenizer produces tokens outside the model's vocabulary"


def test_a_recipe_that_reads_no_text_needs_no_tokenizer(files: Path) -> None:
    (files / "recipe.yaml").write_text("model: model\nvariants: {a: [{cast: float16}]}\n")
    (files / "model" / "tokenizer.json").unlink()
    assert isinstance(outcome(files), _WorkBeganError)


def test_eval_tries_the_held_out_text_too(files: Path) -> None:
    written("heldout.jsonl", "")(files)
    error = outcome(files, "eval")
    assert isinstance(error, QuantlabError)
    assert error.what == "the held-out text is empty"
