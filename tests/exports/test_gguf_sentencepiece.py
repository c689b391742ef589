"""Tokenizers in the style of sentencepiece in GGUF, against sentencepiece's own scores and ids (golden/make_sentencepiece.py)."""

import copy
import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from quantlab.checkpoint.index import open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.exports.gguf.refusal import RefusalError
from quantlab.exports.gguf.token_types import TokenType
from quantlab.exports.gguf.tokenizer import Vocabulary, read_vocabulary
from quantlab.exports.writers import gguf as writer
from quantlab.formats.read_contents import contents_of
from quantlab.formats.stored import StoredWeights

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sentencepiece.json").read_text(encoding="utf-8"))
SIZE = len(GOLDEN["pieces"]) + 4
SETTINGS = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}


def vocabulary_of(tmp_path: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> Vocabulary:
    content = copy.deepcopy(GOLDEN["tokenizer"])
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    found = read_vocabulary(tmp_path, {"vocab_size": SIZE})
    assert found is not None
    return found


def test_scores_and_types_are_those_of_sentencepiece(tmp_path: Path) -> None:
    found = vocabulary_of(tmp_path)
    assert (found.model, found.pre, found.merges) == ("llama", "default", ())
    assert found.special == {"bos": 1, "eos": 2, "unknown": 0}
    assert found.adds_beginning
    assert found.spaces is not None
    assert found.spaces == (True, False)
    for number, (text, score, kind) in enumerate(GOLDEN["pieces"]):
        assert (found.tokens[number], found.types[number]) == (text, kind), (
            text
        )  # GGUF's numbers of types are sentencepiece's
        if text in {"<s>", "</s>", "<|tool|>"}:
            score = -1000.0  # llama.cpp's converter gives it to what tokenizer.json adds
        assert found.scores[number] == score, text
    assert {TokenType(kind) for _, _, kind in GOLDEN["pieces"]} == set(TokenType) - {TokenType.UNUSED}
    assert found.tokens[-4:] == tuple(f"[PAD{number}]" for number in range(SIZE - 4, SIZE))
    assert set(found.types[-4:]) == {TokenType.UNUSED}


def joined(text: str, vocabulary: Vocabulary) -> list[int]:
    """llama.cpp's algorithm, slow: join the neighbours of the highest score, the leftmost first; then bytes for what has no token."""
    numbers = {token: number for number, token in enumerate(vocabulary.tokens)}
    symbols = list(text)
    while True:
        pairs = [a + b for a, b in itertools.pairwise(symbols)]
        known = [(-vocabulary.scores[numbers[pair]], at) for at, pair in enumerate(pairs) if pair in numbers]
        if not known:
            break
        _, at = min(known)
        symbols[at : at + 2] = [pairs[at]]
    return [
        number
        for symbol in symbols
        for number in (
            [numbers[symbol]] if symbol in numbers else [numbers[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        )
    ]


def test_the_scores_join_texts_to_the_tokens_of_sentencepiece(tmp_path: Path) -> None:
    found = vocabulary_of(tmp_path)
    texts = {text: ids for text, ids in GOLDEN["encoded"].items() if "<|tool|>" not in text and text}
    assert len(texts) > 8
    for text, ids in texts.items():
        assert joined("▁" + text.replace(" ", "▁"), found) == ids, text


def test_the_file_has_the_keys_of_llama(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    vocabulary_of(tmp_path)
    checkpoint = open_checkpoint(checkpoints["llama"])
    config = {**checkpoint.config, "vocab_size": SIZE}
    contents = dataclasses.replace(contents_of(checkpoint), config=config, weights=(), directory=tmp_path)
    (tmp_path / "manifest.json").write_text('{"files": {}}')
    writer.write(StoredWeights(Reader(checkpoint)), contents, tmp_path, lambda _: None)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    wanted = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
    }
    assert {key: fields[key] for key in wanted} == wanted
    assert "tokenizer.ggml.merges" not in fields
    assert fields["tokenizer.ggml.scores"][260:262] == [0.0, -1.0]
    assert len(fields["tokenizer.ggml.scores"]) == len(fields["tokenizer.ggml.token_type"]) == SIZE


def test_metaspace_is_read_and_its_difference_told(tmp_path: Path) -> None:
    cut = {"type": "Metaspace", "replacement": "▁", "split": False}

    def with_scheme(scheme: str) -> tuple[bool, bool]:
        changes = {"normalizer": None, "pre_tokenizer": {**cut, "prepend_scheme": scheme}}
        found = vocabulary_of(tmp_path, lambda content: content.update(changes)).spaces
        assert found is not None
        return found

    assert with_scheme("always") == (True, False)
    assert with_scheme("first") == (True, True)
    assert with_scheme("never") == (False, False)


def without(name: str) -> Callable[[dict[str, Any]], object]:
    """A change that takes a token and its merges away."""

    def change(content: dict[str, Any]) -> None:
        del content["model"]["vocab"][name]

    return change


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unigram": (
        lambda content: content.update(model={"type": "Unigram", "byte_fallback": True, "vocab": [], "unk_id": 0}),
        "the tokenizer is of type Unigram",
    ),
    "lower case": (
        lambda content: content["normalizer"]["normalizers"].append({"type": "Lowercase"}),
        "does nothing else to a text; the tokenizer has these steps: Prepend > Replace > Lowercase",
    ),
    "words": (
        lambda content: content.update(pre_tokenizer={"type": "Metaspace", "replacement": "▁", "split": True}),
        "Prepend > Replace > Metaspace",
    ),
    "a byte": (without("<0x41>"), "no token for 1 bytes, the first is <0x41>"),
    "one way of several": (
        lambda content: content["model"]["merges"].remove(["▁", "a"]),
        "llama.cpp would merge '▁' and 'a', which the tokenizer does not",
    ),
    "another order": (
        lambda content: content["model"].update(
            merges=[*content["model"]["merges"][1:], content["model"]["merges"][0], content["model"]["merges"][1]]
        ),
        "is made by merges of different rank",
    ),
    "dropout": (lambda content: content["model"].update(dropout=0.1), "llama.cpp's BPE has no dropout"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_scores_cannot_express_is_refused(case: str, tmp_path: Path) -> None:
    change, reason = REFUSED[case]
    with pytest.raises(RefusalError, match=re.escape(reason)):
        vocabulary_of(tmp_path, change)
