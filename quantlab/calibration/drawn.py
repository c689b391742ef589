"""Calibration samples of datasets: drawn once, kept as JSON lines in the run's directory, read from there ever after.

Every source gives its share of the samples. Its documents come in the order of `quantlab.texts.rows`, and no row is read after the last
that is needed; those that were read are kept, so that a run that continues needs no network and has the same samples.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlab.calibration.corpus import Windows, check_length
from quantlab.checkpoint.tokenizer import load_tokenizer, named_tokens
from quantlab.errors import ArtifactError, CalibrationError
from quantlab.fingerprint import code_fingerprint
from quantlab.hardware import version_of
from quantlab.recipe.schema import Calibration
from quantlab.recipe.texts import LocatedSource, LocatedText
from quantlab.texts.document import Document, DrawnDocument, Encoder, read_documents, write_documents
from quantlab.texts.locate import TEXTS, keep
from quantlab.texts.rows import Reading, documents
from quantlab.texts.shares import allotted


@dataclass(frozen=True)
class DrawnText:
    """The samples of a calibration, and the documents they were cut from.

    Attributes:
        path: the file that keeps the documents.
        content: what the file contains.
        documents: the documents, source by source.
        tokens: the samples [samples, length] int64, source by source.
        samples: number of samples of every source.
        sources: the sources.
    """

    path: Path
    content: bytes
    documents: tuple[DrawnDocument, ...]
    tokens: Tensor
    samples: tuple[int, ...]
    sources: tuple[LocatedSource, ...]

    def keep(self) -> None:
        """Write the documents, unless they are there.

        Raises:
            ArtifactError: the file cannot be written.
        """
        if not self.path.is_file():
            keep(self.path, self.content)

    def written(self) -> dict[str, Any]:
        """What a manifest says about it: every source with its commit, samples, tokens and documents, and the hash of the documents."""
        length = self.tokens.shape[1]
        sources = [
            source.written()
            | {
                "samples": samples,
                "tokens": samples * length,
                "documents": sum(one.source == index for one in self.documents),
            }
            for index, (source, samples) in enumerate(zip(self.sources, self.samples, strict=True))
        ]
        return {"sources": sources, "documents_sha256": hashlib.sha256(self.content).hexdigest()}


def draw_text(
    text: LocatedText, calibration: Calibration, checkpoint: Path, run: Path, *, at_most: int | None = None
) -> DrawnText:
    """Draw the samples of a calibration, or read those that a run kept.

    Args:
        text: the datasets.
        calibration: samples, length and seed.
        checkpoint: the source checkpoint, for its tokenizer.
        run: the run's directory; nothing is written, see `DrawnText.keep`.
        at_most: draw up to this number of samples in place of the calibration's; fewer are no error. The samples of a source begin
            with those of a smaller number.

    Raises:
        CalibrationError: a dataset cannot be read or is too short, or a share gives no sample.
        CheckpointError: there is no usable tokenizer, or it cannot encode a text.
        ArtifactError: the kept file is damaged.
    """
    if at_most is not None:
        calibration = calibration.model_copy(update={"samples": at_most})
    tokenizer, prefix = load_tokenizer(checkpoint)
    where = ", ".join(source.name for source in text.sources)
    check_length(calibration.length, prefix, where=where)
    encoder = Encoder(tokenizer, prefix)
    shares = [source.share for source in text.sources]
    counts = allotted(shares, calibration.samples, what="sample", where="calibration.mix", error=CalibrationError)
    path = run / TEXTS / f"calibration-{_key(text, calibration, checkpoint)[:16]}.jsonl"
    kept = _kept(path)
    drawn: list[DrawnDocument] = []
    rows: list[list[int]] = []
    found_counts: list[int] = []
    for index, (source, count) in enumerate(zip(text.sources, counts, strict=True)):
        if kept is not None:
            found: Iterator[Document] = (one.document for one in kept if one.source == index)
        else:
            reading = Reading(source, named_tokens(checkpoint), encoder.added, calibration.seed, CalibrationError)
            found = documents(reading)
        used: list[Document] = []
        generator = torch.Generator().manual_seed(calibration.seed)
        windows = Windows(_encoded(found, encoder, used), prefix, length=calibration.length, generator=generator)
        taken = windows.draw(count)
        if len(taken) < count and at_most is None:
            raise CalibrationError(
                "the calibration text is too short",
                where=f"dataset {source.name}",
                found=f"{len(used)} documents, {windows.tokens} tokens: {len(taken)} samples of {calibration.length}, not {count}",
                fix="use fewer `samples`, a smaller `length`, a smaller share, or more text",
            )
        found_counts.append(len(taken))
        rows += taken
        drawn += [DrawnDocument(index, document) for document in used]
    content = write_documents(drawn) if kept is None else path.read_bytes()
    return DrawnText(
        path, content, tuple(drawn), torch.tensor(rows, dtype=torch.int64), tuple(found_counts), text.sources
    )


def _encoded(found: Iterator[Document], encoder: Encoder, used: list[Document]) -> Iterator[list[int]]:
    """The tokens of documents, each of which is added to `used` when it is read."""
    for document in found:
        used.append(document)
        yield encoder.tokens(document)


def _kept(path: Path) -> list[DrawnDocument] | None:
    if not path.is_file():
        return None
    try:
        return read_documents(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            "the kept calibration text is damaged",
            where=str(path),
            found=f"{type(error).__name__}: {error}",
            fix="remove the file: the same text is drawn again",
        ) from error


def _key(text: LocatedText, calibration: Calibration, checkpoint: Path) -> str:
    """Hash of everything that decides the documents: datasets, numbers, tokenizer, the library that reads, and this code."""
    tokenizer = hashlib.sha256((checkpoint / "tokenizer.json").read_bytes()).hexdigest()
    parts = (
        text.key, calibration.samples, calibration.length, calibration.seed, tokenizer, named_tokens(checkpoint), version_of("datasets"),
        code_fingerprint(("quantlab.calibration.drawn",)),
    )  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
