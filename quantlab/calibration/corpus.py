"""Calibration text as samples of equal length.

The seed determines the order of the documents, of a corpus here and of a dataset in `quantlab.texts.rows`. A document
at least as long as a sample is cut into non-overlapping windows with a random start, each within one document. Shorter
documents are concatenated until they fill a sample, each with the tokens that the tokenizer puts before a text; the
last one continues in the next sample. Samples are drawn in rounds, one from every document before the second from any,
so that a few long documents do not dominate; tokenization stops when there are enough. Every sample begins with the
tokens that the tokenizer puts before a text (DeepSeek: its beginning-of-sequence token), as in serving engines.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from quantlab.checkpoint.tokenizer import load_tokenizer, text_tokens
from quantlab.errors import CalibrationError
from quantlab.files import read_json_lines


def sample_tokens(corpus: Path, tokenizer_dir: Path, *, samples: int, length: int, seed: int) -> Tensor:
    """Draw samples from the corpus, tokenized for a checkpoint.

    Args:
        corpus: JSON lines with a `text` field.
        tokenizer_dir: the checkpoint, with config.json and tokenizer.json.
        samples: number of samples.
        length: tokens per sample, including those the tokenizer puts before a text.
        seed: seed of the choice; the same seed gives the same samples.

    Returns:
        [samples, length] int64.

    Raises:
        CalibrationError: the corpus cannot be read, has a malformed line, or is too short.
        CheckpointError: there is no usable tokenizer, its vocabulary is larger than the model's, or it cannot encode a text.
    """
    texts = [line["text"] for line in read_calibration_text(corpus)]
    tokenizer, prefix = load_tokenizer(tokenizer_dir)
    check_length(length, prefix, where=str(corpus))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=generator).tolist()
    documents = (text_tokens(tokenizer, prefix, texts[index]) for index in order)
    windows = Windows(documents, prefix, length=length, generator=generator)
    taken = windows.draw(samples)
    if len(taken) < samples:
        raise CalibrationError(
            "the calibration text is too short",
            where=str(corpus),
            found=f"{len(texts)} documents, {windows.tokens} tokens: {len(taken)} samples of {length}, not {samples}",
            fix="use fewer `samples`, a smaller `length`, or more text",
        )
    return torch.tensor(taken, dtype=torch.int64)


def read_calibration_text(corpus: Path) -> list[dict[str, str]]:
    """The documents of a corpus, each with its `text`.

    Raises:
        CalibrationError: the corpus cannot be read or has a malformed line.
    """
    return read_json_lines(corpus, fields=("text",), kind="calibration text", error=CalibrationError)


def tokens_sha256(tokens: Tensor) -> str:
    """sha256 of the samples' shape and tokens, independent of the machine."""
    digest = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    digest.update(tokens.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def check_length(length: int, prefix: tuple[int, ...], *, where: str) -> None:
    """Check that a sample has room for text.

    Raises:
        CalibrationError: it has none.
    """
    if length <= len(prefix):
        raise CalibrationError(
            "a calibration sample is too short to hold text",
            where=where,
            found=f"{length} tokens, of which the tokenizer puts {len(prefix)} before every text",
            fix="raise `length` of the calibration",
        )


class Windows:
    """Samples drawn from documents, which are read lazily: none after the last that is needed.

    Args:
        documents: token ids of each document, without the prefix.
        prefix: token ids before every sample, and before every document that a sample joins.
        length: tokens of a sample.
        generator: chooses where documents are cut.

    Attributes:
        tokens: number of text tokens so far.
    """

    def __init__(
        self, documents: Iterable[list[int]], prefix: tuple[int, ...], *, length: int, generator: torch.Generator
    ) -> None:
        self._documents, self._prefix = documents, list(prefix)
        self._length, self._width = length, length - len(prefix)
        self._generator = generator
        self.tokens = 0

    def draw(self, count: int) -> list[list[int]]:
        """At most `count` samples."""
        taken: list[list[int]] = []
        later: list[list[list[int]]] = []
        for windows in self._per_document():
            taken.append(windows[0])
            later.append(windows[1:])
            if len(taken) == count:
                return taken
        for turn in range(max(map(len, later), default=0)):
            taken.extend(windows[turn] for windows in later if turn < len(windows))
        return taken[:count]

    def _per_document(self) -> Iterator[list[list[int]]]:
        """The windows of one document, or one window of several short documents."""
        joined: list[int] = []
        for ids in self._documents:
            self.tokens += len(ids)
            if len(ids) >= self._width:
                yield self._cut(ids)
            elif ids:
                joined += self._prefix + ids
                while len(joined) >= self._length:
                    yield [joined[: self._length]]
                    rest = joined[self._length :]
                    joined = self._prefix + rest if rest else []

    def _cut(self, ids: list[int]) -> list[list[int]]:
        spare = len(ids) % self._width
        first = int(torch.randint(spare + 1, (1,), generator=self._generator))
        starts = range(first, len(ids) - self._width + 1, self._width)
        order = torch.randperm(len(starts), generator=self._generator).tolist()
        return [self._prefix + ids[starts[index] : starts[index] + self._width] for index in order]
