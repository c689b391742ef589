"""Windows: the scored tokens, their contexts, and their exact number of bytes."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors

from quantlab.checkpoint.tokenizer import load_tokenizer
from quantlab.errors import CheckpointError, EvaluationError
from quantlab.evaluation.quality.windows import Document, cut, read_corpus
from tests.evaluation.conftest import write_corpus, write_tokenizer

TEXT = " two  spaces, naïve café 😀😀 漢字 and \u2028 a separator" * 3


def five(text: str) -> list[Document]:
    """The minimum number of documents of a domain."""
    return [Document("a", text)] * 5


def test_windows_spell_every_byte_once(model: Path) -> None:
    tokenizer, prefix = load_tokenizer(model)
    assert len(prefix) == 1
    # with this length, windows begin within four-byte characters
    for length in (2, 3, 8, 24, 1000):
        held_out = cut(five(TEXT), tokenizer, prefix, length=length, tokens_per_domain=10**6)
        assert sum(window.nbytes for window in held_out.windows) == 5 * len(TEXT.encode())
        ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
        assert held_out.tokens == 5 * len(ids)
        assert all(window.tokens[0] == prefix[0] and window.first == 1 for window in held_out.windows)
        assert all(len(window.tokens) <= length for window in held_out.windows)


def test_bytes_of_a_window_are_those_of_its_tokens(model: Path) -> None:
    tokenizer, prefix = load_tokenizer(model)
    document = "plain ascii words only, so that one token never shares a character with another"
    held_out = cut(five(document), tokenizer, prefix, length=6, tokens_per_domain=10**6)
    for window in held_out.windows:
        assert window.nbytes == len(tokenizer.decode(window.tokens[window.first :].tolist()).encode())


def test_without_a_first_token_of_its_own_a_window_reads_one_that_is_not_scored(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, bos=False)
    tokenizer, prefix = load_tokenizer(tmp_path)
    assert prefix == ()
    text = "some words to read"
    held_out = cut(five(text), tokenizer, prefix, length=4, tokens_per_domain=10**6)
    ids = tokenizer.encode(text).ids
    windows = [ids[start : start + 4] for start in range(0, len(ids), 4) if len(ids[start : start + 4]) > 1]
    first = sorted((window.tokens.tolist() for window in held_out.windows if window.document == 0), key=windows.index)
    assert first == windows
    spelled = [len(tokenizer.decode(window[1:]).encode()) for window in windows]
    assert sum(window.nbytes for window in held_out.windows) == 5 * sum(spelled)


def test_a_beginning_token_that_the_text_spells_is_neither_repeated_nor_scored(model: Path) -> None:
    tokenizer, prefix = load_tokenizer(model)
    for length in (3, 8, 1000):
        plain = cut(five(TEXT), tokenizer, prefix, length=length, tokens_per_domain=10**6)
        spelled = cut(five("<bos>" + TEXT), tokenizer, prefix, length=length, tokens_per_domain=10**6)
        assert spelled.sha256 == plain.sha256, "the same tokens, scored from the same one, and bytes"
    alone = cut([*five(TEXT), Document("a", "<bos>")], tokenizer, prefix, length=8, tokens_per_domain=10**6)
    assert {window.document for window in alone.windows} == set(range(5)), "nothing of it is scored"


def test_what_is_put_after_a_text_is_no_part_of_windows(model: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, bos=False)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    after = processors.TemplateProcessing(single="$A <bos>", special_tokens=[("<bos>", 0)])
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = after
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found, prefix = load_tokenizer(tmp_path)
    held_out = cut(five(TEXT), found, prefix, length=8, tokens_per_domain=10**6)
    assert prefix == ()
    assert not any((window.tokens == 0).any() for window in held_out.windows)


def test_first_windows_of_all_documents_come_before_second_ones(model: Path) -> None:
    tokenizer, prefix = load_tokenizer(model)
    documents = [Document("a", "word and word again, " * 20) for _ in range(6)]
    held_out = cut(documents, tokenizer, prefix, length=17, tokens_per_domain=7 * 16)
    assert sorted(window.document for window in held_out.windows) == [0, 0, 1, 2, 3, 4, 5]
    assert held_out.tokens == 7 * 16


def test_batches_hold_every_window_once_and_little_padding(held_out) -> None:
    batches = held_out.batches(100)
    assert [window for batch in batches for window in batch] == list(held_out.windows)
    assert all(len(batch) == 1 or len(batch) * len(batch[0].tokens) <= 100 for batch in batches)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{no json", "is not JSON"), ('{"text": "no domain"}', "has no domain"), ('["a list"]', "has no domain")],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write_corpus(tmp_path / "corpus.jsonl", documents=5)
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match=message) as raised:
        read_corpus(path)
    assert str(raised.value.where).endswith("corpus.jsonl:11")


@pytest.mark.parametrize(("documents", "cap", "found"), [(4, 10**6, 4), (8, 3 * 23, 3)])
def test_too_few_documents_are_an_error(model: Path, documents: int, cap: int, found: int) -> None:
    tokenizer, prefix = load_tokenizer(model)
    texts = [Document("a", "word and word again, " * 20) for _ in range(documents)]
    with pytest.raises(EvaluationError, match="too few documents") as raised:
        cut(texts, tokenizer, prefix, length=24, tokens_per_domain=cap)
    assert str(raised.value.found).startswith(f"{found} documents")


def test_an_artifact_without_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_first_token_outside_the_vocabulary_is_an_error(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "<other>"}')
    with pytest.raises(CheckpointError, match="not in the vocabulary"):
        load_tokenizer(tmp_path)
