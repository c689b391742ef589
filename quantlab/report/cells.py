"""What the tables show: the columns, what their heads mean, and every cell as text.

Terminal, Markdown and HTML differ in how much room they have, not in what a number looks like; that is decided here
once. A cell is in one of four states: a value, the baseline (there is nothing to compare it with), a failure with its
reason, or not measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from quantlab.evaluation.record import Measured
from quantlab.report.matrix import Matrix, Row

State = Literal["value", "baseline", "failed", "missing"]
Unit = Literal["percent", "change", "ratio", "plain", "nats", "share", "bytes", "seconds", "rate"]
Group = Literal["quality", "memory", "speed"]

INTERVALS = "Intervals are 95 % intervals; losses and changes are paired with the baseline on the same tokens."
PRUNED_NOTE = "Pruned weights are stored as zeros in dense tensors: pruning alone saves neither memory nor time."


@dataclass(frozen=True)
class Column:
    """One column of the tables."""

    key: str
    """Name in matrix.json, with the batch size behind a dot."""
    heading: str
    meaning: str
    """One sentence for people."""
    group: Group
    unit: Unit
    read: Callable[[Row], Measured | float | None]
    better: Literal["low", "high"]
    relative: bool = False
    """Compares with the baseline, so the baseline itself has none."""


@dataclass(frozen=True)
class Cell:
    """One cell as text."""

    state: State
    text: str
    interval: str | None = None
    """`low to high`."""
    margin: str | None = None
    """`±` the wider side of the interval."""
    reason: str | None = None
    """Why it failed."""
    number: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None


def columns(matrix: Matrix) -> tuple[Column, ...]:
    """All columns behind the variant's name: the three that decide first, then the details."""
    decode, prefill = _batches(matrix, "decode"), _batches(matrix, "prefill")
    return (
        *_HEADLINE,
        *_DETAILS,
        *(_rate_column("decode", batch) for batch in decode),
        *(_rate_column("prefill", batch) for batch in prefill),
        *(_ratio_column("decode", batch) for batch in decode if batch != "1"),
        *(_ratio_column("prefill", batch) for batch in prefill),
    )


def cell(matrix: Matrix, row: Row, column: Column) -> Cell:
    """The cell of `row` in `column`."""
    found = column.read(row)
    if found is None:
        return _empty_cell(matrix, row, column)
    if isinstance(found, Measured):
        return Cell(
            state="value",
            text=number(found.value, column.unit),
            interval=interval(found, column.unit),
            margin=_margin(found, column.unit),
            number=found.value,
            low=found.low,
            high=found.high,
            n=found.n,
        )
    return Cell(state="value", text=number(found, column.unit), number=float(found))


def _empty_cell(matrix: Matrix, row: Row, column: Column) -> Cell:
    if column.relative and row.variant == matrix.baseline and row.perplexity is not None:
        return Cell(state="baseline", text="baseline" if column.key == "accuracy_loss_percent" else "–")
    reasons = [failure.reason for failure in row.failures if failure.cell == column.group]
    if reasons:
        return Cell(state="failed", text="failed", reason="; ".join(reasons))
    return Cell(state="missing", text="–")


def number(value: float, unit: Unit) -> str:
    """A number as people read it; the unit stands in the column's head unless it changes with the size."""
    match unit:
        case "percent":
            text = f"{value:.1f}"
        case "change" | "ratio" | "plain":
            text = f"{value:.2f}"
        case "nats":
            text = f"{value:.4f}" if value == 0 or abs(value) >= 0.00005 else f"{value:.1e}".replace("e-0", "e-")
        case "share":
            text = f"{100 * value:.2f}"
        case "bytes":
            return human_bytes(value)
        case "seconds":
            text = f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
        case "rate":
            text = f"{value:,.2f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"
    return _signed(text)


def interval(measured: Measured, unit: Unit) -> str:
    """`low to high`: an en dash between negative numbers is hard to read."""
    return f"{number(measured.low, unit)} to {number(measured.high, unit)}"


def _margin(measured: Measured, unit: Unit) -> str:
    """`±` the wider side of the interval, with the digits of the value."""
    wider = max(measured.high - measured.value, measured.value - measured.low)
    if unit == "rate":
        _, _, digits = number(measured.value, unit).partition(".")
        return f"±{wider:,.{len(digits)}f}"
    return "±" + number(wider, unit)


def human_bytes(value: float) -> str:
    """Bytes in powers of 1000, as disks are sold."""
    size, name = float(value), "B"
    for name in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5 or name == "TB":
            break
        size /= 1000
    digits = 0 if name == "B" or abs(size) >= 99.95 else 1 if abs(size) >= 9.995 else 2
    return f"{size:.{digits}f} {name}"


def failures(matrix: Matrix) -> tuple[str, ...]:
    """Every failure as a line."""
    return tuple(
        f"{row.variant}: {failure.cell} could not be measured: {failure.reason}"
        for row in matrix.rows
        for failure in row.failures
    )


def notes(matrix: Matrix) -> tuple[str, ...]:
    """What a reader must know to read the numbers rightly."""
    found = [INTERVALS]
    twins = sorted({row.twin for row in matrix.rows if row.twin})
    if twins:
        twin = f"a random-weight twin ({'; '.join(twins)})"
        found.append(
            f"Speed does not depend on the values of the weights; it is measured on {twin}, interleaved with FP16's."
        )
    if any("prune" in row.description.lower() for row in matrix.rows):
        found.append(PRUNED_NOTE)
    dtypes = sorted({row.compute_dtype for row in matrix.rows if row.compute_dtype})
    if len(dtypes) > 1:
        found.append(f"Quality was measured with different compute dtypes: {', '.join(dtypes)}.")
    if len({tuple(sorted(row.versions.items())) for row in matrix.rows}) > 1:
        found.append(
            "The rows were measured with different versions of the software; see the versions of each row in matrix.json."
        )
    return tuple(found)


def _signed(text: str) -> str:
    """With a real minus, and none before a zero."""
    digits = text.removeprefix("-")
    if not digits.strip("0.,"):
        return digits
    return text if digits == text else "−" + digits


def _batches(matrix: Matrix, phase: Literal["decode", "prefill"]) -> list[str]:
    """Batch sizes that some row has a number for."""
    rates = [
        row.decode_tokens_per_second if phase == "decode" else row.prefill_tokens_per_second for row in matrix.rows
    ]
    return [batch for batch in rates[0] if any(rate[batch] is not None for rate in rates)]


def _rate_column(phase: Literal["decode", "prefill"], batch: str) -> Column:
    return Column(
        key=f"{phase}_tokens_per_second.{batch}",
        heading=f"{phase} tok/s at {batch}",
        meaning=f"Tokens per second of {phase} at batch size {batch}, all sequences together, measured on a random-weight twin.",
        group="speed",
        unit="rate",
        read=lambda row: (row.decode_tokens_per_second if phase == "decode" else row.prefill_tokens_per_second)[batch],
        better="high",
    )


def _ratio_column(phase: Literal["decode", "prefill"], batch: str) -> Column:
    return Column(
        key=f"{phase}_over_fp16.{batch}",
        heading=f"{phase} × FP16 at {batch}",
        meaning=f"Speed of {phase} at batch size {batch} over that of FP16, measured on a random-weight twin.",
        group="speed",
        unit="ratio",
        read=lambda row: (row.decode_over_fp16 if phase == "decode" else row.prefill_over_fp16)[batch],
        better="high",
    )


_HEADLINE = (
    Column(
        key="accuracy_loss_percent",
        heading="accuracy loss %",
        meaning="Next-token accuracy lost on held-out text, in percent of the baseline's. An interval that reaches zero shows no measurable loss.",
        group="quality",
        unit="change",
        read=lambda row: row.accuracy_loss_percent,
        better="low",
        relative=True,
    ),
    Column(
        key="memory_percent_of_fp16",
        heading="memory % of FP16",
        meaning="Bytes the runtime holds for all weights, scales included, in percent of the same weights at two bytes each.",
        group="memory",
        unit="percent",
        read=lambda row: row.memory_percent_of_fp16,
        better="low",
    ),
    Column(
        key="speed_over_fp16",
        heading="speed × FP16",
        meaning="Decode speed at batch size 1 over that of FP16, measured on a random-weight twin in runs interleaved with it.",
        group="speed",
        unit="ratio",
        read=lambda row: row.speed_over_fp16,
        better="high",
    ),
)

_DETAILS = (
    Column(
        key="perplexity_change_percent",
        heading="perplexity change %",
        meaning="Change of perplexity against the baseline on the same tokens.",
        group="quality",
        unit="change",
        read=lambda row: row.perplexity_change_percent,
        better="low",
        relative=True,
    ),
    Column(
        key="kl_to_baseline",
        heading="KL, nats",
        meaning="Mean KL divergence of the predictions from the baseline's, per token, in nats.",
        group="quality",
        unit="nats",
        read=lambda row: row.kl_to_baseline,
        better="low",
        relative=True,
    ),
    Column(
        key="top1_agreement",
        heading="top-1 agreement %",
        meaning="Tokens for which baseline and variant hold the same next token most likely.",
        group="quality",
        unit="share",
        read=lambda row: row.top1_agreement,
        better="high",
        relative=True,
    ),
    Column(
        key="perplexity",
        heading="perplexity",
        meaning="Perplexity on held-out text.",
        group="quality",
        unit="plain",
        read=lambda row: row.perplexity,
        better="low",
    ),
    Column(
        key="next_token_accuracy",
        heading="accuracy %",
        meaning="Tokens whose most likely prediction was right.",
        group="quality",
        unit="share",
        read=lambda row: row.next_token_accuracy,
        better="high",
    ),
    Column(
        key="artifact_bytes",
        heading="size on disk",
        meaning="Size of the artifact's shards, configuration and tokenizer, in powers of 1000.",
        group="memory",
        unit="bytes",
        read=lambda row: row.artifact_bytes,
        better="low",
    ),
    Column(
        key="weights_bytes",
        heading="weights",
        meaning="Bytes the runtime holds for weights, scales included.",
        group="memory",
        unit="bytes",
        read=lambda row: row.weights_bytes,
        better="low",
    ),
    Column(
        key="quantized_weights_percent_of_fp16",
        heading="quantized part %",
        meaning="The same as memory % of FP16, of the quantized tensors only.",
        group="memory",
        unit="percent",
        read=lambda row: row.quantized_weights_percent_of_fp16,
        better="low",
    ),
    Column(
        key="peak_memory_bytes",
        heading="peak memory",
        meaning="Largest resident size of a process that loads the artifact and reads one window of text, libraries included.",
        group="memory",
        unit="bytes",
        read=lambda row: row.peak_memory_bytes,
        better="low",
    ),
    Column(
        key="load_seconds",
        heading="load, s",
        meaning="Seconds until the artifact is ready to compute.",
        group="memory",
        unit="seconds",
        read=lambda row: row.load_seconds_interval,
        better="low",
    ),
)
