"""The tokens that engines and quantlab's runtime both compute."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quantlab.architectures.config import size_of
from quantlab.checkpoint.index import open_checkpoint
from quantlab.checkpoint.tokenizer import load_tokenizer
from quantlab.errors import EvaluationError
from quantlab.evaluation.quality.windows import cut, read_corpus
from quantlab.files import read_json

TOKENS: Final = 2000
"""Default number of tokens: few enough for the slowest engine on a processor, in enough documents for an interval."""
FEWEST_TOKENS: Final = 100
_DOCUMENTS_PER_DOMAIN: Final = 6
_RANDOM_DOCUMENTS: Final = 24
_PROMPT: Final = 32
_HELD_OUT: Final = Path(__file__).parents[3] / "eval" / "corpora" / "heldout.jsonl"
"""The held-out text of a checkout of the repository; an installed package has none."""


@dataclass(frozen=True)
class JudgedText:
    """Token ids of some texts.

    Attributes:
        documents: token ids of each text, at least two.
        strata: domain of each text [D].
        description: what they are.
    """

    documents: tuple[tuple[int, ...], ...]
    strata: NDArray[np.int64]
    description: str

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text that have a log-probability."""
        return [len(document) - 1 for document in self.documents]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(repr(self.documents).encode()).hexdigest()

    def prompts(self, count: int) -> tuple[tuple[int, ...], ...]:
        """Beginnings of `count` texts, evenly spaced among all."""
        every = max(len(self.documents) // count, 1)
        return tuple(document[: min(_PROMPT, len(document) // 2)] for document in self.documents[::every][:count])


def judged_text(directory: Path, *, tokens: int = TOKENS, corpus: Path | None = None) -> JudgedText:
    """The tokens to judge a checkpoint with: held-out text, or random ids if it has no tokenizer or there is no text.

    Args:
        directory: the checkpoint, with its tokenizer.
        tokens: number of tokens, all texts together.
        corpus: JSON lines with `domain` and `text`; the repository's held-out text if None.

    Raises:
        EvaluationError: there are too few tokens or texts.
        CheckpointError: the tokenizer cannot be used.
    """
    if tokens < FEWEST_TOKENS:
        raise EvaluationError(
            "too few tokens to judge an engine",
            where="--tokens",
            found=str(tokens),
            fix=f"give at least {FEWEST_TOKENS}",
        )
    path = corpus or _HELD_OUT
    context = size_of(read_json(directory / "config.json"), "max_position_embeddings", default=0) or tokens
    if not (directory / "tokenizer.json").is_file() or not path.is_file():
        return _random(directory, tokens, context)
    tokenizer, prefix = load_tokenizer(directory)
    texts = read_corpus(path)
    of_domain = max(tokens // len({text.domain for text in texts}), 1)
    length = min(max(of_domain // _DOCUMENTS_PER_DOMAIN, 8), context)
    found = cut(texts, tokenizer, prefix, length=length, tokens_per_domain=of_domain)
    windows = [window for window in found.windows if len(window.tokens) > 1]
    documents = tuple(tuple(window.tokens.tolist()) for window in windows)
    strata = np.array([found.strata[window.document] for window in windows], dtype=np.int64)
    return JudgedText(documents, strata, f"{len(documents)} texts of held-out text")


def _random(directory: Path, tokens: int, context: int) -> JudgedText:
    """Random ids of a checkpoint's vocabulary."""
    vocabulary = size_of(open_checkpoint(directory).config, "vocab_size")
    length = min(max(tokens // _RANDOM_DOCUMENTS, 4), context)
    ids = np.random.default_rng(0).integers(0, vocabulary, (_RANDOM_DOCUMENTS, length))
    strata = np.zeros(_RANDOM_DOCUMENTS, dtype=np.int64)
    return JudgedText(tuple(map(tuple, ids.tolist())), strata, f"{len(ids)} texts of random tokens")
