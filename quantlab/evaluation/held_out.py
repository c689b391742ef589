"""Held-out text of datasets: drawn once into a file of the run's directory, which measurements read like a corpus.

The number of documents is fixed, not the number of tokens, so that the text of a suite does not depend on a tokenizer; messages still depend on the
chat template. Each dataset is a domain of its own.
"""

import hashlib
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from quantlab.checkpoint.tokenizer import named_tokens
from quantlab.errors import EvaluationError
from quantlab.evaluation.suite import LoadedSuite
from quantlab.fingerprint import code_fingerprint
from quantlab.hardware import version_of
from quantlab.recipe.texts import LocatedSource
from quantlab.texts.locate import TEXTS, Commits, keep, locate
from quantlab.texts.rows import Reading, documents
from quantlab.texts.shares import allotted


@dataclass(frozen=True)
class DrawnHeldOut:
    """Held-out documents.

    Attributes:
        path: the file that keeps them.
        content: JSON lines with `domain` and `text`.
        sources: the datasets.
    """

    path: Path
    content: bytes
    sources: tuple[LocatedSource, ...]

    def keep(self) -> None:
        """Write the documents, and beside them where they are from.

        Raises:
            ArtifactError: a file cannot be written.
        """
        if not self.path.is_file():
            origin = json.dumps([source.written() for source in self.sources], indent=1)
            keep(self.path.with_suffix(".sources.json"), f"{origin}\n".encode())
            keep(self.path, self.content)


def draw_held_out(suite: LoadedSuite, checkpoint: Path, run: Path, commits: Commits) -> DrawnHeldOut | None:
    """Draw the documents of a suite's datasets, or read those that a run kept; None if the suite names a corpus.

    Args:
        suite: the suite.
        checkpoint: the source checkpoint, for its chat template.
        run: the run's directory; nothing is written, see `DrawnHeldOut.keep`.
        commits: commits that are known.

    Raises:
        EvaluationError: a dataset cannot be read, or has too few documents.
    """
    text = suite.suite.text
    if not text.sources:
        return None
    located = locate(
        text.sources,
        lambda name: (suite.path.parent / name).resolve(),
        checkpoint,
        commits=commits,
        error=EvaluationError,
    )
    shares = [source.share for source in located.sources]
    counts = allotted(shares, text.documents, what="document", where="text.mix", error=EvaluationError)
    code = code_fingerprint(("quantlab.evaluation.held_out",))
    parts = (located.key, text.documents, text.seed, named_tokens(checkpoint), version_of("datasets"), code)
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    path = run / TEXTS / f"held-out-{key}.jsonl"
    if path.is_file():
        return DrawnHeldOut(path, path.read_bytes(), located.sources)
    lines = []
    for source, count in zip(located.sources, counts, strict=True):
        reading = Reading(source, named_tokens(checkpoint), (), text.seed, EvaluationError)
        texts = ["".join(piece.text for piece in one) for one in islice(documents(reading), count)]
        if len(texts) < count:
            raise EvaluationError(
                "the held-out text has too few documents",
                where=reading.where,
                found=f"{len(texts)} documents that are not empty, not {count}",
                fix=f"use fewer `documents` in {suite.path}, another split or a smaller share",
            )
        lines += [json.dumps({"domain": source.name, "text": one}, ensure_ascii=False) for one in texts]
    return DrawnHeldOut(path, "".join(f"{line}\n" for line in lines).encode(), located.sources)
