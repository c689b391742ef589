"""Overlap of calibration and held-out text: runs of 13 words that both contain.

A model calibrated on the text it is judged by looks better than it is. Thirteen words in a row is the usual criterion for text that was copied
(GPT-3, arXiv 2005.14165, appendix C). Words are compared in lower case without punctuation.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

WORDS: Final = 13
_WORD: Final = re.compile(r"\w+")


@dataclass(frozen=True)
class Overlap:
    """How much of the held-out text is in the calibration text.

    Attributes:
        documents: held-out documents.
        shared_documents: those with a run of words that the calibration text contains.
        runs: different runs of words in the held-out text.
        shared_runs: those that the calibration text contains.
        example: one of them, empty if there is none.
    """

    documents: int
    shared_documents: int
    runs: int
    shared_runs: int
    example: str

    @property
    def text(self) -> str:
        """The overlap in one line."""
        if not self.shared_runs:
            return f"calibration and held-out text share no {WORDS} words in a row ({self.runs:,} compared)"
        return (
            f"{self.shared_documents} of {self.documents} held-out documents share {WORDS} words in a row with the calibration text "
            f"({self.shared_runs:,} of {self.runs:,}), for example: {self.example}"
        )


def overlap_of(calibration: Iterable[str], held_out: Iterable[str]) -> Overlap:
    """Compare two texts.

    Args:
        calibration: its documents.
        held_out: its documents.
    """
    documents = [set(_runs(text)) for text in held_out]
    known = set().union(*documents)
    shared: set[tuple[str, ...]] = set()
    for text in calibration:
        shared.update(known.intersection(_runs(text)))
    touched = sum(not document.isdisjoint(shared) for document in documents)
    return Overlap(len(documents), touched, len(known), len(shared), " ".join(min(shared)) if shared else "")


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return zip(*(words[start:] for start in range(WORDS)), strict=False)
