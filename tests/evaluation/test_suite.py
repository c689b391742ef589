"""Suites: every shipped suite loads, and errors name the mistake."""

import subprocess
import sys
from pathlib import Path

import pytest

from quantlab.errors import EvaluationError, RecipeError
from quantlab.evaluation.suite import load_suite

SUITES = sorted((Path(__file__).parents[2] / "eval" / "suites").rglob("*.yaml"))


def test_all_suites_are_found() -> None:
    assert [path.name for path in SUITES] == [
        "core.yaml",
        "guide.yaml",
        "long_context.yaml",
        "quick.yaml",
        "reasoning.yaml",
    ]


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_shipped_suites_load(path: Path) -> None:
    loaded = load_suite(path)
    assert loaded.suite.name == path.stem
    assert loaded.corpus.is_file()
    speed = loaded.suite.speed
    if speed is None or not speed.shape:
        return
    # groups of 128 must divide every width, or linears of a W4A16 twin would stay unquantized
    for width in ("hidden_size", "intermediate_size", "moe_intermediate_size", "kv_lora_rank"):
        assert int(str(speed.shape[width])) % 128 == 0


def test_the_hash_covers_suite_and_corpus(suite: Path) -> None:
    first = load_suite(suite).sha256
    assert load_suite(suite).sha256 == first
    suite.write_text(suite.read_text() + "# a comment\n")
    second = load_suite(suite).sha256
    corpus = load_suite(suite).corpus
    corpus.write_text(corpus.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert len({first, second, load_suite(suite).sha256}) == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("length: 24", "lenght: 24", "did you mean `length`"),
        ("length: 24", "length: 2", "out of range"),
        ("version: 1", "", "`version` is missing"),
        ("rounds: 8", "rounds: 5", "out of range"),
        ("prompt: 4", "prompt: four", "wrong type"),
        ("batches: [1, 2]", "batches: []", "empty"),
        ("  description: a twin of nothing", "  descripton: a twin", "did you mean `description`"),
        ("  description: a twin of nothing\n", "", "needs `shape` and `description`"),
        ("tokens_per_domain: 600", "tokens_per_domain: 600, dtype: float23", "did you mean `float32`"),
    ],
)
def test_mistakes_are_named(suite: Path, old: str, new: str, message: str) -> None:
    text = suite.read_text()
    assert old in text
    suite.write_text(text.replace(old, new))
    with pytest.raises(RecipeError, match=r"tiny\.yaml:") as raised:
        load_suite(suite)
    assert message in str(raised.value)


def test_a_missing_corpus_is_named(suite: Path) -> None:
    load_suite(suite).corpus.unlink()
    with pytest.raises(EvaluationError, match="held-out text cannot be read"):
        load_suite(suite)


def test_asking_needs_no_torch() -> None:
    modules = (
        "record",
        "suite",
        "statistics",
        "processes.messages",
        "processes.worker_client",
        "evaluate",
        "served.metrics",
        "speed.own_layers",
    )
    imports = "; ".join(f"import quantlab.evaluation.{module}" for module in modules)
    code = f"import sys; {imports}; print('torch' in sys.modules or 'transformers' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
