"""Calibration text: the tokens of samples, and the errors for unusable text."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from quantlab.calibration.corpus import sample_tokens, tokens_sha256
from quantlab.checkpoint.tokenizer import load_tokenizer
from quantlab.errors import CalibrationError, CheckpointError, QuantlabError
from quantlab.evaluation.quality.windows import cut, read_corpus

ROOT = Path(__file__).parent.parent.parent
VOCABULARY = 512
BOS = 1


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tokenizer whose token n is the word "wn" and whose begin token is 1."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    words = {"<unk>": 0, "<bos>": BOS} | {f"w{n}": n for n in range(2, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": "<bos>"}))
    (directory / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY}))
    return directory


def write(path: Path, documents: Iterable[Iterable[int]]) -> Path:
    """Write a corpus of documents, given by their tokens."""
    path.write_text("".join(json.dumps({"text": " ".join(f"w{n}" for n in document)}) + "\n" for document in documents))
    return path


def consecutive(ids: Tensor) -> bool:
    return bool((ids.diff() == 1).all())


def test_samples_lie_inside_long_documents(checkpoint: Path, tmp_path: Path) -> None:
    documents = [range(start, start + 45) for start in range(10, 500, 50)]
    corpus = write(tmp_path / "corpus.jsonl", documents)
    tokens = sample_tokens(corpus, checkpoint, samples=40, length=11, seed=0)
    assert tokens.shape == (40, 11)
    assert tokens.dtype == torch.int64
    assert (tokens[:, 0] == BOS).all()
    assert all(consecutive(sample[1:]) for sample in tokens)
    owners = [(int(sample[1]) - 10) // 50 for sample in tokens]
    assert all(sorted(owners[turn * 10 : turn * 10 + 10]) == list(range(10)) for turn in range(4))  # in rounds
    words = tokens[:, 1:].flatten()
    assert len(words.unique()) == len(words)  # windows do not overlap
    assert len({(int(sample[1]) - 10) % 50 % 10 for sample in tokens}) > 1  # the first window begins anywhere


def test_short_documents_are_joined(checkpoint: Path, tmp_path: Path) -> None:
    documents = [range(start, start + 7) for start in range(10, 500, 10)]
    tokens = sample_tokens(write(tmp_path / "corpus.jsonl", documents), checkpoint, samples=20, length=20, seed=0)
    assert (tokens[:, 0] == BOS).all()
    for sample in tokens:
        starts = [*(sample == BOS).nonzero().flatten().tolist(), len(sample)]
        assert all(consecutive(sample[start + 1 : end]) for start, end in pairwise(starts))
    words = tokens[tokens != BOS]
    assert len(words.unique()) == len(words)
    assert 20 * 20 - len(words) <= 20 * 4


def test_long_and_short_documents_together(checkpoint: Path, tmp_path: Path) -> None:
    documents = [range(10, 60), range(100, 105), range(110, 115), [], range(200, 250)]
    tokens = sample_tokens(write(tmp_path / "corpus.jsonl", documents), checkpoint, samples=11, length=10, seed=4)
    joined = [sample for sample in tokens if 100 <= int(sample[1]) < 120]
    assert len(joined) == 1
    assert sorted(joined[0][joined[0] != BOS].tolist())[:4] in ([100, 101, 102, 103], [100, 101, 102, 110])


def test_the_seed_decides(checkpoint: Path, tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.jsonl", [range(start, start + 45) for start in range(10, 500, 50)])
    before = torch.random.get_rng_state()
    one, same, other = (sample_tokens(corpus, checkpoint, samples=8, length=11, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert tokens_sha256(one) == tokens_sha256(same) != tokens_sha256(other)
    assert tokens_sha256(one) != tokens_sha256(one.view(4, 22))
    assert torch.equal(before, torch.random.get_rng_state())


def test_fewer_samples_are_the_first_of_more(checkpoint: Path, tmp_path: Path) -> None:
    """Reading stops when there are enough samples, which does not change the earlier ones."""
    corpus = write(tmp_path / "corpus.jsonl", [range(start, start + 45) for start in range(10, 500, 50)])
    many = sample_tokens(corpus, checkpoint, samples=30, length=11, seed=0)
    for count in (1, 9, 10, 11, 25):
        assert torch.equal(sample_tokens(corpus, checkpoint, samples=count, length=11, seed=0), many[:count])


def test_without_a_beginning_token(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer_config.json").unlink()
    corpus = write(tmp_path / "corpus.jsonl", [range(10, 60)])
    tokens = sample_tokens(corpus, checkpoint, samples=5, length=10, seed=0)
    assert sorted(tokens.flatten().tolist()) == list(range(10, 60))


def test_the_reference_corpus() -> None:
    directory = ROOT / "eval" / "reference" / "deepseek-v3-mini"
    tokens = sample_tokens(ROOT / "eval" / "corpora" / "calibration.jsonl", directory, samples=128, length=512, seed=0)
    assert tokens.shape == (128, 512)
    assert (tokens[:, 0] == 0).all()
    assert len(tokens[:, 1:].flatten().unique()) > 4000


@pytest.mark.parametrize(("template", "prefix"), [("<bos> $A <eos>", [BOS]), ("$A <eos>", [])])
def test_what_the_tokenizer_puts_after_a_text_is_left_out(
    checkpoint: Path, tmp_path: Path, template: str, prefix: list[int]
) -> None:
    (checkpoint / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    specials = [(token, number) for token, number in (("<bos>", BOS), ("<eos>", 2)) if token in template]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=specials)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    tokens = sample_tokens(write(tmp_path / "c.jsonl", [range(10, 60)]), checkpoint, samples=4, length=10, seed=0)
    assert tokens[:, : len(prefix)].tolist() == [prefix] * 4
    assert all(consecutive(sample[len(prefix) :]) for sample in tokens)


def test_a_beginning_token_that_the_text_spells_is_not_repeated(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.add_special_tokens(["<bos>"])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    found = []
    for name, begin in (("plain", ""), ("spelled", "<bos>")):
        documents = [
            " ".join(f"w{n}" for n in range(start, start + size)) for start, size in ((10, 50), (70, 4), (80, 9))
        ]
        corpus = tmp_path / f"{name}.jsonl"
        corpus.write_text("".join(json.dumps({"text": begin + text}) + "\n" for text in documents))
        found.append(sample_tokens(corpus, checkpoint, samples=6, length=10, seed=0))
    assert torch.equal(*found)
    assert not ((found[1][:, 1:] == BOS) & (found[1][:, :-1] == BOS)).any()


def test_a_byte_order_mark_and_blank_lines_change_nothing(checkpoint: Path, tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.jsonl", [range(10, 60)])
    plain = sample_tokens(corpus, checkpoint, samples=2, length=10, seed=0)
    corpus.write_bytes(b"\xef\xbb\xbf\r\n" + corpus.read_bytes() + b"\n \n")
    assert torch.equal(sample_tokens(corpus, checkpoint, samples=2, length=10, seed=0), plain)


def refusal(kind: type[QuantlabError], corpus: Path, checkpoint: Path, *, samples: int = 2, length: int = 10) -> str:
    with pytest.raises(kind) as problem:
        sample_tokens(corpus, checkpoint, samples=samples, length=length, seed=0)
    return str(problem.value)


def test_text_that_cannot_be_read(checkpoint: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    assert "the calibration text cannot be read\n" in refusal(CalibrationError, corpus, checkpoint)
    corpus.write_bytes(b'{"text": "\xff"}')
    assert "the calibration text cannot be read\n" in refusal(CalibrationError, corpus, checkpoint)
    corpus.write_text("\n \n")
    assert "the calibration text is empty\n" in refusal(CalibrationError, corpus, checkpoint)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("no JSON", "a line of the calibration text is not JSON"),
        ("[" * 100_000, "a line of the calibration text is not JSON"),
        ('{"content": "w3"}', "a line of the calibration text has no text"),
        ('{"text": 3}', "a line of the calibration text has no text"),
        ('{"text": null}', "a line of the calibration text has no text"),
        ('["w3"]', "a line of the calibration text has no text"),
        ("\ufeff{}", "a line of the calibration text is not JSON"),
    ],
)
def test_malformed_lines(checkpoint: Path, tmp_path: Path, line: str, what: str) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "w2 w3"}\n\n' + line + "\n")
    message = refusal(CalibrationError, corpus, checkpoint)
    assert message.startswith(what + "\n")
    assert f"where: {corpus}:3\n" in message
    assert 'fix: write one object per line: {"text": …}' in message


@pytest.mark.parametrize("half", ["\\ud800", "\\udc00", "w9 \\udc00\\ud800"])
def test_half_of_a_surrogate_pair(checkpoint: Path, tmp_path: Path, half: str) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "w2 \\ud83d\\ude00"}\n{"text": "' + half + '"}\n')
    message = refusal(CalibrationError, corpus, checkpoint)
    assert message.startswith("a line of the calibration text is not valid Unicode\n")
    assert f"where: {corpus}:2\n" in message
    assert message.isascii()


def test_too_little_text(checkpoint: Path, tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.jsonl", [range(10, 15)])
    message = refusal(CalibrationError, corpus, checkpoint)
    assert message.startswith("the calibration text is too short\n")
    assert "found: 1 documents, 5 tokens: 0 samples of 10, not 2" in message
    corpus = write(tmp_path / "corpus.jsonl", [range(10, 50)])
    assert "1 documents, 40 tokens: 4 samples of 10, not 5" in refusal(CalibrationError, corpus, checkpoint, samples=5)
    message = refusal(CalibrationError, corpus, checkpoint, length=1)
    assert message.startswith("a calibration sample is too short to hold text\n")


def test_tokenizers_that_cannot_be_used(checkpoint: Path, tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.jsonl", [range(10, 60)])
    (checkpoint / "config.json").write_text('{"vocab_size": 20}')
    message = refusal(CheckpointError, corpus, checkpoint)
    assert message.startswith("the tokenizer produces tokens outside the model's vocabulary\n")
    assert "a vocabulary of 20" in message
    (checkpoint / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": {"content": "<s>"}}')
    message = refusal(CheckpointError, corpus, checkpoint)
    assert message.startswith("the beginning-of-sequence token is not in the vocabulary\n")
    assert "found: '<s>'" in message
    (checkpoint / "tokenizer.json").write_text("{}")
    assert refusal(CheckpointError, corpus, checkpoint).startswith("the tokenizer cannot be read\n")
    (checkpoint / "tokenizer.json").unlink()
    assert refusal(CheckpointError, corpus, checkpoint).startswith("the checkpoint has no tokenizer\n")


LINES = [
    b'{"domain": "a", "text": "w2 w3 w4 w5"}', b'{"domain": "b", "text": "<bos>w2 w3"}', b'{"domain": "a", "text": null}',
    b'{"domain": 1, "text": 2}', b'{"text": "w9"}', b"[]", b"null", b"", b" ", b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"\r", b"{",
    b'{"domain": "a", "text": ""}', b'{"domain": "a", "text": "\\ud800"}', b'{"domain": "a", "text": "\\ud83d\\ude00"}',
    b'{"domain": "a", "text": "\xe9"}', b"9" * 5000, b"NaN", b'{"domain": "a", "text": "w2\\u2028w3\\u0000"}',
]  # fmt: skip


@pytest.mark.slow
def test_no_corpus_ends_in_a_traceback(checkpoint: Path, tmp_path: Path) -> None:
    """Lines of every kind in any order, with bytes between them: calibration and held-out text are read alike, or refused."""
    corpus = tmp_path / "corpus.jsonl"
    tokenizer, prefix = load_tokenizer(checkpoint)
    good = st.lists(st.sampled_from([LINES[0], LINES[1], b"", b" "]), min_size=1, max_size=16)
    lines = st.one_of(good, st.lists(st.one_of(st.sampled_from(LINES), st.binary(max_size=8)), max_size=8))
    counts, complete = Counter[str](), list[bool]()

    def outcome(read: Callable[[], object]) -> str:
        try:
            read()
        except QuantlabError as error:
            complete.append(bool(error.where and error.found and error.fix))
            return error.what
        return "read"

    @settings(
        max_examples=2000, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.one_of(lines.map(b"\n".join), st.binary(max_size=64)))
    def holds(content: bytes) -> None:
        corpus.write_bytes(content)
        calibration = outcome(lambda: sample_tokens(corpus, checkpoint, samples=2, length=4, seed=0))
        held_out = outcome(lambda: cut(read_corpus(corpus), tokenizer, prefix, length=4, tokens_per_domain=99))
        unread = "cannot be read", "is empty", "is not JSON", "has no text", "is not valid Unicode"
        if "has no domain" not in held_out:
            for problem in unread:
                assert (problem in calibration) == (problem in held_out), content
        counts.update((calibration, held_out))

    holds()
    assert counts["read"] > 100
    assert len(counts) > 10, counts
    assert all(complete)
