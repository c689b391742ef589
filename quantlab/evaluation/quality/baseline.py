"""The baseline's predictions, stored so that every other artifact can be compared with them exactly.

The KL needs the baseline's full distribution at every token. Stored logits would be tokens x vocabulary numbers (29 GB for
56,000 tokens and a vocabulary of 129,280), and the top k probabilities do not give the exact KL. The logits are a matrix product
of the head with the hidden state after the final norm. So the hidden states are stored, tokens x hidden numbers (1.6 GB at
DeepSeek-V3's width, 57 MB at 256), and the head's weight once. Another artifact's cell recomputes the baseline's logits, a few
hundred tokens at a time, with the same operation on the same bits; a model compared with itself has a KL of exactly zero.

States are stored in float32, which represents bfloat16 states exactly. If the states of all tokens exceed the suite's limit, those
of every second, third … token are stored and the KL is computed on these tokens only; all other numbers use every token. States
are read through a memory map.
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
"""Default size limit of the stored hidden states."""


@dataclass(frozen=True)
class TokenScores:
    """One value per scored token, in the order of the windows [T].

    Attributes:
        nll: negative log-probability of the next token, in nats, float32.
        top1: the most likely token, int64.
        lse: logsumexp of the logits, float32.
        kl: KL(baseline || this model) of every `stride`-th token in nats, float32, starting at the first; None for the baseline.
        correct: whether the most likely token is the next token of the text.
        stride: distance between tokens with a KL.
    """

    nll: Tensor
    top1: Tensor
    lse: Tensor
    correct: Tensor
    kl: Tensor | None
    stride: int = 1


class BaselineWriter:
    """Stores the baseline's hidden states in the order in which they are computed."""

    def __init__(self, directory: Path, *, key: str, tokens_sha256: str, most_bytes: int = MOST_BYTES) -> None:
        """Empty the directory.

        Args:
            directory: output directory of the predictions.
            key: hash of everything that the baseline's predictions depend on.
            tokens_sha256: hash of the windows to be scored.
            most_bytes: maximum size of the hidden states; if needed, evenly spaced tokens are stored.
        """
        self._directory, self._key, self._tokens_sha256 = directory, key, tokens_sha256
        self._most_bytes, self._stride, self._seen = most_bytes, 1, 0
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        self._file: BinaryIO | None = None

    def begin(self, head: Tensor, *, tokens: int) -> None:
        """Store the head's weight [V, H] and the header of the file of hidden states of `tokens` tokens or a sample of them."""
        self._stride = -(-tokens // max(self._most_bytes // (4 * head.shape[1]), 1))
        np.save(self._directory / _HEAD, head.detach().float().cpu().numpy())
        self._file = (self._directory / _HIDDEN).open("wb")
        header = {"descr": "<f4", "fortran_order": False, "shape": (-(-tokens // self._stride), head.shape[1])}
        np.lib.format.write_array_header_1_0(self._file, header)

    def write(self, hidden: Tensor) -> None:
        """Append hidden states [t, H]: those of the sampled tokens."""
        assert self._file is not None, "begin comes before write"
        first, self._seen = -self._seen % self._stride, self._seen + len(hidden)
        hidden[first :: self._stride].float().cpu().numpy().tofile(self._file)

    def finish(self, scores: TokenScores) -> None:
        """Store the baseline's token scores; this completes the predictions."""
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
    """The stored predictions of the baseline.

    Attributes:
        head: the head's weight [V, H].
        scores: scores of every token.
        stride: distance between tokens whose hidden states are stored.
        nbytes: size of all files in bytes.
    """

    def __init__(
        self, directory: Path, *, tokens_sha256: str, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        """Open the predictions.

        Args:
            directory: output directory of a finished BaselineWriter.
            tokens_sha256: hash of the windows to be scored.
            dtype: dtype of the computation; the head is converted back to it.
            device: device of the computation, the CPU if None. The head is moved there; the rest stays on the CPU until use.

        Raises:
            EvaluationError: the baseline scored other tokens.
        """
        kept = json.loads((directory / PREDICTIONS_COMPLETE).read_text())
        if kept["tokens"] != tokens_sha256:
            raise EvaluationError(
                "the artifact and the baseline read the same text as different tokens",
                where=str(directory),
                found="the tokenizers differ",
                fix="copy the tokenizer files of the source into the artifact",
            )
        self.stride = int(kept["stride"])
        self.nbytes = sum((directory / name).stat().st_size for name in (_HIDDEN, _HEAD, _TOKENS))
        self.head = torch.from_numpy(np.load(directory / _HEAD)).to(device=device, dtype=dtype)
        with np.load(directory / _TOKENS) as tokens:
            nll, top1, lse, correct = (torch.from_numpy(tokens[name]) for name in ("nll", "top1", "lse", "correct"))
        self.scores = TokenScores(nll, top1, lse, correct, kl=None, stride=self.stride)
        self._states: NDArray[np.float32] = np.load(directory / _HIDDEN, mmap_mode="r")

    def read(self, span: slice) -> tuple[Tensor, Tensor]:
        """The stored states of a span of tokens.

        Returns:
            Offsets within the span of the tokens with stored states [k], and these states [k, H] in the head's device and dtype.
        """
        first, last = -(-span.start // self.stride), -(-span.stop // self.stride)
        offsets = torch.arange(first, last) * self.stride - span.start
        return offsets, torch.from_numpy(self._states[first:last].copy()).to(self.head)
