"""What the baseline predicted, kept so that every other row can be compared with it exactly.

KL needs the baseline's whole distribution at every token. Stored as logits that is tokens x vocabulary numbers (29 GB for
56,000 tokens of a vocabulary of 129,280); stored as the best k probabilities it is no longer the KL. But the logits are
one matrix product away from the hidden state after the final norm, so that is what is stored: tokens x hidden numbers
(1.6 GB for DeepSeek-V3's width, 57 MB for 256), with the head's weight once. A row recomputes the baseline's logits a few
hundred tokens at a time by the same operation on the same bits, so a model compared with itself has a KL of exactly zero.

Float32 holds float32 and bfloat16 states alike. The states are read with plain reads, not a memory map, whose pages would
count into the resident size of the process that reads them.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantlab.checkpoint.files import write_atomically
from quantlab.errors import EvaluationError
from quantlab.evaluation.jobs import PREDICTIONS_COMPLETE

_HIDDEN, _HEAD, _TOKENS = "hidden.npy", "head.npy", "tokens.npz"


@dataclass(frozen=True)
class TokenScores:
    """One value per scored token, in the order of the windows [T].

    Attributes:
        nll: minus the log-probability of the token that follows, in nats, float32.
        top1: the most likely token, int64.
        lse: logsumexp of the logits, float32.
        kl: KL(baseline || this model) in nats, float32; None for the baseline.
        correct: whether the most likely token was the one that follows.
    """

    nll: Tensor
    top1: Tensor
    lse: Tensor
    correct: Tensor
    kl: Tensor | None


class BaselineWriter:
    """Takes the baseline's hidden states in the order they are computed."""

    def __init__(self, directory: Path, *, key: str, tokens_sha256: str) -> None:
        self._directory, self._key, self._tokens_sha256 = directory, key, tokens_sha256
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        self._file: BinaryIO | None = None

    def begin(self, head: Tensor, *, tokens: int) -> None:
        """Keep the head's weight [V, H] and make room for `tokens` hidden states."""
        np.save(self._directory / _HEAD, head.detach().float().cpu().numpy())
        self._file = (self._directory / _HIDDEN).open("wb")
        header = {"descr": "<f4", "fortran_order": False, "shape": (tokens, head.shape[1])}
        np.lib.format.write_array_header_1_0(self._file, header)

    def write(self, hidden: Tensor) -> None:
        """Append hidden states [t, H]."""
        assert self._file is not None, "begin comes before write"
        hidden.float().cpu().numpy().tofile(self._file)

    def finish(self, scores: TokenScores) -> None:
        """Keep what the baseline scored; only now are the predictions complete."""
        assert self._file is not None, "begin comes before finish"
        self._file.close()
        with (self._directory / _TOKENS).open("wb") as file:
            np.savez(
                file,
                nll=scores.nll.numpy(),
                top1=scores.top1.numpy(),
                lse=scores.lse.numpy(),
                correct=scores.correct.numpy(),
            )
        write_atomically(
            self._directory / PREDICTIONS_COMPLETE,
            json.dumps({"key": self._key, "tokens": self._tokens_sha256}).encode(),
        )


class Baseline:
    """The baseline's predictions, read back in the order they were written; a context manager."""

    def __init__(
        self, directory: Path, *, tokens_sha256: str, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        """Open the predictions.

        Args:
            directory: where a BaselineWriter finished.
            tokens_sha256: hash of the windows about to be scored.
            dtype: of the computation; the head is brought back to it.
            device: of the computation, the CPU if None: the head goes there, all else stays on the CPU until it is used.

        Raises:
            EvaluationError: the baseline scored other tokens.
        """
        found = json.loads((directory / PREDICTIONS_COMPLETE).read_text())["tokens"]
        if found != tokens_sha256:
            raise EvaluationError(
                "the artifact and the baseline read the same text as different tokens",
                where=str(directory),
                found="the tokenizers differ",
                fix="give the artifact the tokenizer's files of its source",
            )
        self.head = torch.from_numpy(np.load(directory / _HEAD)).to(device=device, dtype=dtype)
        with np.load(directory / _TOKENS) as tokens:
            nll, top1, lse, correct = (torch.from_numpy(tokens[name]) for name in ("nll", "top1", "lse", "correct"))
        self.scores = TokenScores(nll, top1, lse, correct, kl=None)
        self._file = (directory / _HIDDEN).open("rb")
        np.lib.format.read_magic(self._file)
        np.lib.format.read_array_header_1_0(self._file)

    def __enter__(self) -> "Baseline":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, tokens: int) -> Tensor:
        """The hidden states of the next `tokens` tokens [t, H] where and in the dtype the computation is."""
        width = self.head.shape[1]
        states: NDArray[np.float32] = np.fromfile(self._file, dtype="<f4", count=tokens * width)
        return torch.from_numpy(states).view(tokens, width).to(self.head)
