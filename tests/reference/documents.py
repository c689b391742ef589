"""Documents as lists of short units, and detection of repeated text.

A unit is a paragraph, or a run of sentences for sources without paragraph breaks. Text is removed by unit, so that a
repeated licence paragraph removes only that paragraph from a document.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

SHINGLE_WORDS = 13
"""Length of the word sequences that count as leakage when training text shares one with the held-out text."""

_WORD = re.compile(r"\w+")
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+(?=[A-Z\"'(])")
_BLANK_LINES = re.compile(r"\n\s*\n")
_TRAILING_SPACE = re.compile(r"[ \t]+$", re.MULTILINE)


@dataclass(frozen=True)
class Document:
    """One text with its origin."""

    id: str
    """Source name and path inside it; unique in a corpus."""
    domain: str
    source: str
    units: tuple[str, ...]
    joiner: str = "\n\n"

    @property
    def text(self) -> str:
        """The document as one string."""
        return self.joiner.join(self.units)

    def with_units(self, units: Iterable[str]) -> "Document":
        """The same document holding other units."""
        return Document(self.id, self.domain, self.source, tuple(units), self.joiner)


def normalise(text: str) -> str:
    """Unicode NFC, no control characters besides tab and newline, no trailing blanks."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\u00a0", " ").replace("\u00b6", "")
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c)[0] != "C")
    return _TRAILING_SPACE.sub("", text)


def paragraphs(text: str) -> list[str]:
    """Blocks separated by blank lines."""
    return [block.strip("\n") for block in _BLANK_LINES.split(normalise(text)) if block.strip()]


def sentence_runs(text: str, characters: int = 600) -> list[str]:
    """Runs of whole sentences of about `characters` each, for texts that come without paragraph breaks."""
    runs: list[str] = []
    current = ""
    for sentence in _SENTENCE_END.split(normalise(text).strip()):
        current = f"{current} {sentence}" if current else sentence
        if len(current) >= characters:
            runs.append(current)
            current = ""
    return [*runs, current] if current else runs


def split_document(document: Document, characters: int) -> Iterator[Document]:
    """Consecutive parts of at most about `characters`, cut between units and of similar length."""
    total = sum(len(unit) for unit in document.units)
    parts = max(1, round(total / characters + 0.3))
    if parts == 1:
        yield document
        return
    held: list[str] = []
    filled = 0
    part = 1
    for unit in document.units:
        held.append(unit)
        filled += len(unit)
        if filled >= total * part / parts:
            yield Document(f"{document.id}#{part}", document.domain, document.source, tuple(held), document.joiner)
            held, part = [], part + 1
    if held:
        yield Document(f"{document.id}#{part}", document.domain, document.source, tuple(held), document.joiner)


def unit_key(unit: str) -> bytes:
    """Identity of a unit up to case, punctuation and spacing."""
    return hashlib.blake2b(" ".join(_WORD.findall(unit.lower())).encode(), digest_size=8).digest()


def shingles(unit: str) -> Iterator[int]:
    """Hashes of every run of `SHINGLE_WORDS` words of a unit; valid inside one process only."""
    words = _WORD.findall(unit.lower())
    for start in range(len(words) - SHINGLE_WORDS + 1):
        yield hash(tuple(words[start : start + SHINGLE_WORDS]))


class Deduplicator:
    """Removes units that were seen before."""

    def __init__(self, minimum_length: int = 40) -> None:
        self._seen: set[bytes] = set()
        self._minimum_length = minimum_length
        self.dropped = 0

    def filter(self, document: Document) -> Document:
        """The document without long units that occurred before, in it or in an earlier document."""
        kept = []
        for unit in document.units:
            if len(unit) >= self._minimum_length:
                key = unit_key(unit)
                if key in self._seen:
                    self.dropped += 1
                    continue
                self._seen.add(key)
            kept.append(unit)
        return document.with_units(kept)
