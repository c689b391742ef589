"""Held-out text as windows of tokens.

A document is tokenized once with the artifact's own tokenizer.json and cut into windows that do not overlap. If the tokenizer
adds a beginning-of-sequence token, every window begins with it and all tokens of the text are scored; otherwise the first token
of a window is only read. A beginning-of-sequence token that the text itself begins with is that of the first window: it is
neither repeated nor scored, and its bytes do not count.

**Bytes.** Bits per byte compares models with different tokenizers only if exactly the bytes of the scored tokens are counted. A
token may be part of a character. So a token's text is defined as the text from its first character up to the first character of
the next token: consecutive windows then share no byte and lose none.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from quantlab.checkpoint.tokenizer import encode_text, load_tokenizer
from quantlab.errors import EvaluationError
from quantlab.evaluation.suite import LoadedSuite
from quantlab.files import read_json_lines

_FEWEST_DOCUMENTS = 5  # fewer documents are not representative; statistics.py has the minimum for an interval


@dataclass(frozen=True)
class Document:
    """A held-out text and its domain."""

    domain: str
    text: str


@dataclass(frozen=True)
class Window:
    """Tokens of one forward pass.

    Attributes:
        document: index of its document.
        tokens: token ids [n], including the tokenizer's prefix.
        first: index of the first token that is scored, at least 1.
        nbytes: UTF-8 bytes of the scored tokens' text.
    """

    document: int
    tokens: NDArray[np.int64]
    first: int
    nbytes: int

    @property
    def scored(self) -> int:
        return len(self.tokens) - self.first


@dataclass(frozen=True)
class HeldOut:
    """The scored text.

    Attributes:
        domains: names of the domains, sorted.
        strata: domain of each document, as an index into `domains` [D].
        windows: the windows, longest first, so that batches need little padding.
        sha256: hash of the windows' tokens.
    """

    domains: tuple[str, ...]
    strata: NDArray[np.int64]
    windows: tuple[Window, ...]
    sha256: str

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return sum(window.scored for window in self.windows)

    def documents(self) -> NDArray[np.int64]:
        """Document index of every scored token, in the order of the windows [T]."""
        return np.repeat([window.document for window in self.windows], [window.scored for window in self.windows])

    def batches(self, tokens: int) -> list[tuple[Window, ...]]:
        """Split the windows, in order, into batches of at most `tokens` tokens including padding."""
        batches: list[tuple[Window, ...]] = []
        start = 0
        while start < len(self.windows):
            rows = max(tokens // len(self.windows[start].tokens), 1)
            batches.append(self.windows[start : start + rows])
            start += rows
        return batches


def read_corpus(path: Path) -> list[Document]:
    """Read the documents of a JSON lines file.

    Raises:
        EvaluationError: the file cannot be read or is empty, or a line is malformed.
    """
    lines = read_json_lines(path, fields=("domain", "text"), kind="held-out text", error=EvaluationError)
    return [Document(line["domain"], line["text"]) for line in lines]


def held_out_text(suite: LoadedSuite, directory: Path) -> HeldOut:
    """The windows of a suite, cut with the tokenizer of a checkpoint.

    Raises:
        EvaluationError: the text cannot be read, or a domain has too few documents.
        CheckpointError: there is no usable tokenizer.
    """
    text = suite.suite.text
    tokenizer, prefix = load_tokenizer(directory)
    documents = read_corpus(suite.corpus)
    return cut(documents, tokenizer, prefix, length=text.length, tokens_per_domain=text.tokens_per_domain)


def cut(
    documents: Sequence[Document], tokenizer: Tokenizer, prefix: tuple[int, ...], *, length: int, tokens_per_domain: int
) -> HeldOut:
    """Cut documents into the windows to score.

    Args:
        documents: the held-out text.
        tokenizer: as from `load_tokenizer`.
        prefix: token ids that every window begins with.
        length: maximum tokens of a window, including the prefix.
        tokens_per_domain: maximum scored tokens of a domain. First windows of all documents are taken before second windows
            and so on, because the number of documents determines the width of the intervals.

    Raises:
        EvaluationError: a domain has too few documents.
        CheckpointError: the tokenizer cannot encode a document.
    """
    domains = tuple(sorted({document.domain for document in documents}))
    strata = np.array([domains.index(document.domain) for document in documents])
    taken: list[Window] = []
    for domain in domains:
        scored, seen = 0, set()
        texts = [(index, document.text) for index, document in enumerate(documents) if document.domain == domain]
        for window in _in_turns(texts, tokenizer, prefix, length):
            if scored + window.scored > tokens_per_domain:
                break
            scored += window.scored
            seen.add(window.document)
            taken.append(window)
        if len(seen) < _FEWEST_DOCUMENTS:
            raise EvaluationError(
                "a domain has too few documents",
                where=f"domain {domain}",
                found=f"{len(seen)} documents with text within {tokens_per_domain} tokens",
                fix=f"give at least {_FEWEST_DOCUMENTS} documents per domain, and increase `tokens_per_domain` until they fit",
            )
    taken.sort(key=lambda window: -len(window.tokens))
    digest = hashlib.sha256()
    for window in taken:
        digest.update(f"{window.document} {window.first} {window.nbytes} ".encode() + window.tokens.tobytes())
    return HeldOut(domains, strata, tuple(taken), digest.hexdigest())


def _in_turns(
    texts: Sequence[tuple[int, str]], tokenizer: Tokenizer, prefix: tuple[int, ...], length: int
) -> Iterator[Window]:
    """First windows of all documents, then second windows and so on; a document is tokenized when its first window is needed."""
    found: list[list[Window]] = []
    for index, text in texts:
        found.append(_windows(index, text, tokenizer, prefix, length))
        yield from found[-1][:1]
    for turn in range(1, max(map(len, found), default=0)):
        yield from (windows[turn] for windows in found if turn < len(windows))


def _windows(document: int, text: str, tokenizer: Tokenizer, prefix: tuple[int, ...], length: int) -> list[Window]:
    encoding, before_it = encode_text(tokenizer, prefix, text)
    ids = np.array(encoding.ids[before_it:], dtype=np.int64)
    width = length - len(prefix)
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes = (
        1 + (code_points >= 0x80) + (code_points >= 0x800) + (code_points >= 0x10000)
    )  # UTF-8 bytes of each character
    before = np.concatenate([[0], np.cumsum(sizes)])
    starts = np.array([start for start, _ in encoding.offsets[before_it:]] + [len(text)], dtype=np.int64)
    starts[:1] = encoding.offsets[before_it - 1][1] if before_it else 0
    begins = before[starts]
    windows = []
    for start in range(0, len(ids), width):
        stop = min(start + width, len(ids))
        first_scored = start if prefix else start + 1
        if first_scored < stop:
            tokens = np.concatenate([np.array(prefix, dtype=np.int64), ids[start:stop]])
            nbytes = int(begins[stop] - begins[first_scored])
            windows.append(Window(document, tokens, max(len(prefix), 1), nbytes))
    return windows
