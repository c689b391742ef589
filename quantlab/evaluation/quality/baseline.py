"""Predictions of the baseline, kept so that every other row can be compared with them exactly.

KL needs the baseline's whole distribution at every token. Stored as logits that is tokens x vocabulary numbers (29 GB for
56,000 tokens of a vocabulary of 129,280); stored as the best k probabilities it is no longer the KL. But the logits are
one matrix product away from the hidden state after the final norm, so that is what is stored: tokens x hidden numbers
(1.6 GB for DeepSeek-V3's width, 57 MB for 256), with the head's weight once. A row recomputes the baseline's logits a few
hundred tokens at a time by the same operation on the same bits, so a model compared with itself has a KL of exactly zero.

Float32 holds float32 and bfloat16 states alike. Where the states of all tokens would take more than the suite allows, those of
every second, third … token are kept, and the KL is that of these; all else is of every token. States are read through a memory
map.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantlab.errors import EvaluationError
from quantlab.evaluation.processes.messages import PREDICTIONS_COMPLETE
from quantlab.files import write_atomically

_HIDDEN, _HEAD, _TOKENS = "hidden.npy", "head.npy", "tokens.npz"
MOST_BYTES: Final = 4 << 30
"""Default limit for the hidden states that are kept."""


@dataclass(frozen=True)
class TokenScores:
    """One value per scored token, in the order of the windows [T].

    Attributes:
        nll: minus the log-probability of the token that follows, in nats, float32.
        top1: the most likely token, int64.
        lse: logsumexp of the logits, float32.
        kl: KL(baseline || this model) of every `stride`-th token in nats, float32; None for the baseline.
        correct: whether the most likely token was the one that follows.
        stride: one token in so many has a KL, the first is one of them.
    """

    nll: Tensor
    top1: Tensor
    lse: Tensor
    correct: Tensor
    kl: Tensor | None
    stride: int = 1


class BaselineWriter:
    """Takes the baseline's hidden states in the order they are computed."""

    def __init__(self, directory: Path, *, key: str, tokens_sha256: str, most_bytes: int = MOST_BYTES) -> None:
        """Begin anew.

        Args:
            directory: takes the predictions; emptied.
            key: identifies the baseline and everything its predictions depend on.
            tokens_sha256: hash of the windows about to be scored.
            most_bytes: that hidden states may take; as many tokens are kept, evenly spaced.
        """
        self._directory, self._key, self._tokens_sha256 = directory, key, tokens_sha256
        self._most_bytes, self._stride, self._seen = most_bytes, 1, 0
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        self._file: BinaryIO | None = None

    def begin(self, head: Tensor, *, tokens: int) -> None:
        """Keep the head's weight [V, H] and make room for the hidden states of so many tokens, or of a sample of them."""
        self._stride = -(-tokens // max(self._most_bytes // (4 * head.shape[1]), 1))
        np.save(self._directory / _HEAD, head.detach().float().cpu().numpy())
        self._file = (self._directory / _HIDDEN).open("wb")
        header = {"descr": "<f4", "fortran_order": False, "shape": (-(-tokens // self._stride), head.shape[1])}
        np.lib.format.write_array_header_1_0(self._file, header)

    def write(self, hidden: Tensor) -> None:
        """Append hidden states [t, H], those that are kept."""
        assert self._file is not None, "begin comes before write"
        first, self._seen = -self._seen % self._stride, self._seen + len(hidden)
        hidden[first :: self._stride].float().cpu().numpy().tofile(self._file)

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
            json.dumps({"key": self._key, "tokens": self._tokens_sha256, "stride": self._stride}).encode(),
        )


class Baseline:
    """The baseline's predictions, read back.

    Attributes:
        head: its weight [V, H].
        scores: of every token.
        stride: one token in so many has its hidden state kept.
        nbytes: of all files.
    """

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
        kept = json.loads((directory / PREDICTIONS_COMPLETE).read_text())
        if kept["tokens"] != tokens_sha256:
            raise EvaluationError(
                "the artifact and the baseline read the same text as different tokens",
                where=str(directory),
                found="the tokenizers differ",
                fix="give the artifact the tokenizer's files of its source",
            )
        self.stride = int(kept["stride"])
        self.nbytes = sum((directory / name).stat().st_size for name in (_HIDDEN, _HEAD, _TOKENS))
        self.head = torch.from_numpy(np.load(directory / _HEAD)).to(device=device, dtype=dtype)
        with np.load(directory / _TOKENS) as tokens:
            nll, top1, lse, correct = (torch.from_numpy(tokens[name]) for name in ("nll", "top1", "lse", "correct"))
        self.scores = TokenScores(nll, top1, lse, correct, kl=None, stride=self.stride)
        self._states: NDArray[np.float32] = np.load(directory / _HIDDEN, mmap_mode="r")

    def read(self, span: slice) -> tuple[Tensor, Tensor]:
        """The tokens of a span whose states are kept, counted from its first [k], and these states [k, H] where and in the dtype
        the computation is.
        """
        first, last = -(-span.start // self.stride), -(-span.stop // self.stride)
        places = torch.arange(first, last) * self.stride - span.start
        return places, torch.from_numpy(self._states[first:last].copy()).to(self.head)
