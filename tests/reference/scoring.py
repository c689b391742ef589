"""Bits per byte and perplexity of held-out documents, scored whole with a sliding window."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WINDOW = 1024
STRIDE = 512
"""Every token after a document's first window is predicted from at least WINDOW - STRIDE tokens."""


@dataclass(frozen=True)
class Window:
    """Tokens of one forward pass and the first target position that counts."""

    document: int
    tokens: tuple[int, ...]
    first: int


def windows(documents: list[dict[str, Any]]) -> Iterator[Window]:
    """Overlapping windows of every document; each token but the begin token is scored exactly once."""
    for index, document in enumerate(documents):
        ids = document["ids"]
        scored = 1
        while scored < len(ids):
            start = max(0, scored - STRIDE) if scored > 1 else 0
            end = min(start + WINDOW + 1, len(ids))
            yield Window(index, tuple(ids[start:end]), scored - start - 1)
            scored = end


def score(
    documents: list[dict[str, Any]], losses: Callable[[Tensor], Tensor], *, device: str, batch: int = 16
) -> list[float]:
    """Negative log likelihood in nats of every document.

    Args:
        documents: rows with `ids` that begin with the begin token.
        losses: maps tokens [B, T+1] to the loss of each of the T next tokens, [B, T].
        device: where the tokens go.
        batch: windows in one call.
    """
    totals = [0.0] * len(documents)
    queue = sorted(windows(documents), key=lambda window: -len(window.tokens))
    for start in range(0, len(queue), batch):
        group = queue[start : start + batch]
        longest = len(group[0].tokens)
        padded = torch.zeros(len(group), longest, dtype=torch.long)
        for row, window in enumerate(group):
            padded[row, : len(window.tokens)] = torch.tensor(window.tokens)
        table = losses(padded.to(device)).double().cpu()
        for row, window in enumerate(group):
            totals[window.document] += table[row, window.first : len(window.tokens) - 1].sum().item()
    return totals


def summarise(documents: list[dict[str, Any]], totals: Iterable[float]) -> dict[str, dict[str, float]]:
    """Bits per byte and token perplexity, overall and by domain."""
    rows = list(zip(documents, totals, strict=True))
    result = {}
    for domain in ["all", *sorted({str(document["domain"]) for document in documents})]:
        chosen = [(d, nats) for d, nats in rows if domain in ("all", d["domain"])]
        nats = sum(value for _, value in chosen)
        size = sum(d["bytes"] for d, _ in chosen)
        tokens = sum(len(d["ids"]) - 1 for d, _ in chosen)
        result[domain] = {
            "bits_per_byte": round(nats / math.log(2) / size, 4), "perplexity": round(math.exp(nats / tokens), 3),
            "bytes": size, "tokens": tokens, "documents": len(chosen),
        }  # fmt: skip
    return result
