"""Long contexts by implementation of attention as text, for every kind of table."""

from dataclasses import dataclass
from typing import Final

from quantlab.evaluation.measured import Measured
from quantlab.evaluation.record import AttentionCell
from quantlab.report.matrix.matrix import Matrix
from quantlab.report.matrix.table_cells import human_bytes, number

TITLE: Final = "Long contexts, by implementation of attention"
_MEMORY: Final = {
    "process": "the resident size of a separate process",
    "cuda": "the memory of torch's allocator on the GPU",
}


@dataclass(frozen=True)
class AttentionLine:
    """One implementation at one context length; `reason` replaces the cells if it was not measured."""

    implementation: str
    context: str
    cells: tuple[str, ...]
    reason: str | None


@dataclass(frozen=True)
class AttentionTable:
    title: str
    heads: tuple[str, ...]
    lines: tuple[AttentionLine, ...]
    note: str


def attention_table(matrix: Matrix) -> AttentionTable | None:
    """The table of a matrix; None if attention was not measured."""
    found = matrix.attention
    if found is None:
        return None
    heads = ("attention", "context", "prefill peak", "decode peak", "cache", "prefill, tok/s", "decode, tok/s")
    layout = f", {found.layout}" if found.layout else ""
    note = (
        f"One sequence on a random-weight twin ({found.twin}{layout}), on {matrix.hardware}. Peaks are memory above the "
        f"weights, including the cache: {_MEMORY[found.memory]}. Rates are medians, in brackets the quartiles of n repeats; "
        "decoding proceeds step by step with a growing cache."
    )
    return AttentionTable(TITLE, heads, tuple(_line(cell) for cell in found.cells), note)


def _line(cell: AttentionCell) -> AttentionLine:
    sizes = (cell.prefill_peak_bytes, cell.decode_peak_bytes, cell.cache_bytes)
    rates = ("prefill_tokens_per_second", "decode_tokens_per_second")
    cells = (
        *("–" if size is None else human_bytes(size) for size in sizes),
        *(_rate(getattr(cell, name), cell.quartiles.get(name), noisy=name in cell.noise) for name in rates),
    )
    return AttentionLine(cell.implementation, f"{cell.context:,}", cells, cell.reason)


def _rate(measured: Measured | None, quartiles: tuple[float, float] | None, *, noisy: bool) -> str:
    if measured is None:
        return "–"
    ends = " to ".join(number(end, "rate") for end in quartiles) + ", " if quartiles else ""
    return f"{number(measured.value, 'rate')} ({ends}n = {measured.n})" + " noisy" * noisy
