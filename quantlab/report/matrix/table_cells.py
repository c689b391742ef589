"""Table cells as text, and the notes that explain the numbers.

Terminal, Markdown and HTML show different numbers of columns, but format a number in the same way, which is defined here. A
table cell has one of four states: a value, the baseline (nothing to compare it with), a failure with its reason, or not measured.
"""

from dataclasses import dataclass
from typing import Final, Literal

from quantlab.evaluation.measured import Measured, Significance, Verdict
from quantlab.evaluation.memory.metrics import Expanded
from quantlab.evaluation.metric import Unit
from quantlab.evaluation.speed.metrics import TIMED_WORDS, Timed
from quantlab.report.matrix.columns import Column
from quantlab.report.matrix.matrix import Matrix
from quantlab.report.matrix.row_verdicts import judge, significance_of, tested
from quantlab.report.matrix.rows import Row, noise_of, task_of

State = Literal["value", "baseline", "failed", "missing"]

INTERVALS = (
    "Intervals are 95 % intervals unless called a range; intervals of speed predict the number of another evaluation on the same "
    "machine; losses and changes are paired with the baseline on the same tokens."
)
HOLM_NOTE = "A loss is called measurable only if it stays so after correction for the number of rows (Holm)."
LEAST_SERVED_KL: Final = 1e-3
"""KL in nats per token below which no warning is shown."""
SERVED_KL_OVER_ROUNDING: Final = 4.0
"""Ratio to the KL of the baseline's 16-bit decode above which a KL is more than rounding."""
PRUNED_NOTE = "Pruned weights are stored as zeros in dense tensors: pruning alone saves neither memory nor time."


@dataclass(frozen=True)
class TableCell:
    """One table cell as text."""

    state: State
    text: str
    interval: str | None = None
    """`low to high`."""
    margin: str | None = None
    """`±` the wider side of the interval, or `range low to high`."""
    reason: str | None = None
    """Reason of a failure."""
    number: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    verdict: Verdict | None = None
    """Verdict on a loss."""
    significance: Significance | None = None
    noise: str | None = None
    """Reason why the measurement is noisy."""


def cell(matrix: Matrix, row: Row, column: Column) -> TableCell:
    """The cell of `row` in `column`."""
    found = column.read(row)
    if found is None:
        return _empty_cell(matrix, row, column)
    if isinstance(found, Measured):
        return TableCell(
            state="value",
            text=number(found.value, column.unit),
            interval=interval(found, column.unit) if found.n != 1 else None,
            margin=_margin(found, column.unit) if found.n != 1 else None,
            number=found.value,
            low=found.low,
            high=found.high,
            n=found.n,
            verdict=judge(found, _significance(row, column)) if column.metric.loss else None,
            significance=_significance(row, column),
            noise=noise_of(row, column.noise_key),
        )
    return TableCell(state="value", text=number(found, column.unit), number=float(found))


def _significance(row: Row, column: Column) -> Significance | None:
    if column.task is not None:
        task = task_of(row, column.task)
        return task.significance if task and column.relative else None
    return significance_of(row, column.key)


def counts(matrix: Matrix, column: Column) -> str:
    """The n of a column, or its smallest and largest n; empty for numbers without an interval."""
    found = {n for row in matrix.rows if (n := cell(matrix, row, column).n)}
    return " to ".join(f"{n:,}" for n in sorted({min(found), max(found)})) if found else ""


def details(row: Row, column: Column, found: TableCell) -> str:
    """A number with interval, n, verdict, p and origin, in one line."""
    parts = [f"{row.variant}, {column.heading}: {found.text}"]
    if found.interval:
        parts[0] += f" ({found.interval})"
    if found.n is not None:
        parts.append(f"n = {found.n:,}")
    if found.verdict:
        parts.append({"loss": "measurable loss", "gain": "measurable gain"}.get(found.verdict, found.verdict))
    if found.significance:
        p, holm = found.significance.p, found.significance.holm_p
        parts.append(f"p = {p:.2g}" if holm is None else f"p = {holm:.2g} after Holm")
    if found.noise:
        parts.append(f"noisy: {found.noise}")
    if found.state in ("failed", "missing"):
        parts.append(found.reason or "not measured")
    if row.link:
        parts.append(f"{row.link}, {column.field}")
    return " · ".join(parts)


def _empty_cell(matrix: Matrix, row: Row, column: Column) -> TableCell:
    if column.relative and row.variant == matrix.baseline and row.quality is not None:
        return TableCell(state="baseline", text="baseline" if column.is_headline else "–")
    measured_with = "quality" if column.group == "domains" else column.group
    reasons = [failure.reason for failure in row.failures if failure.cell == measured_with]
    if reasons:
        return TableCell(state="failed", text="failed", reason="; ".join(reasons))
    return TableCell(state="missing", text="–")


def number(value: float, unit: Unit) -> str:
    """Format a number. The unit is in the column's heading, unless it depends on the magnitude."""
    match unit:
        case "percent":
            text = f"{value:.1f}"
        case "change" | "ratio" | "plain":
            text = f"{value:.2f}"
        case "nats":
            text = f"{value:.4f}" if value == 0 or abs(value) >= 0.00005 else f"{value:.1e}".replace("e-0", "e-")
        case "share" | "points":
            text = f"{100 * value:.2f}"
        case "milliseconds":
            text = f"{1000 * value:.1f}" if abs(value) < 0.1 else f"{1000 * value:,.0f}"
        case "bytes":
            return human_bytes(value)
        case "seconds":
            text = f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
        case "rate":
            text = f"{value:,.2f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"
    return _signed(text)


def interval(measured: Measured, unit: Unit) -> str:
    """`low to high`: an en dash between negative numbers is hard to read. A range is labelled as one."""
    ends = _ends(measured, unit)
    return ends if measured.interval == "95 %" else f"{ends}, range of {measured.reason}"


def _ends(measured: Measured, unit: Unit) -> str:
    return f"{number(measured.low, unit)} to {number(measured.high, unit)}"


def _margin(measured: Measured, unit: Unit) -> str:
    """`±` the wider side of the interval, with the digits of the value; for a range, its ends."""
    if measured.interval != "95 %":
        return f"range {_ends(measured, unit)}"
    wider = max(measured.high - measured.value, measured.value - measured.low)
    if unit == "rate":
        _, _, digits = number(measured.value, unit).partition(".")
        return f"±{wider:,.{len(digits)}f}"
    return "±" + number(wider, unit)


def human_bytes(value: float) -> str:
    """Bytes with units in powers of 1000."""
    size, name = float(value), "B"
    for name in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5 or name == "TB":
            break
        size /= 1000
    digits = 0 if name == "B" or abs(size) >= 99.95 else 1 if abs(size) >= 9.995 else 2
    return _signed(f"{size:.{digits}f}") + f" {name}"


def failures(matrix: Matrix) -> tuple[str, ...]:
    """One line for every failure."""
    return tuple(
        f"{row.variant}: {failure.cell} could not be measured: {failure.reason}"
        for row in matrix.rows
        for failure in row.failures
    )


def tokens_of(matrix: Matrix) -> list[int]:
    """Numbers of tokens on which quality was measured: one, or several if rows differ."""
    return sorted({row.quality.perplexity.n for row in matrix.rows if row.quality})


def served_warnings(matrix: Matrix) -> tuple[str, ...]:
    """Warnings for variants whose 16-bit decode differs from float32 by more than rounding.

    The baseline's own decode estimates the rounding. KL grows with the square of the logits' error, so four times the KL is twice
    the error. Below 0.001 nats no error matters.
    """
    own = [row.record.served for row in matrix.rows if row.variant == matrix.baseline]
    rounding = own[0].served_kl.value if own and own[0] else 0.0
    most = max(LEAST_SERVED_KL, SERVED_KL_OVER_ROUNDING * rounding)
    return tuple(
        f"{row.variant} decoded in {served.served_dtype} ({served.served_steps}) is {number(served.served_kl.value, 'nats')} nats "
        f"per token from itself in float32, where {matrix.baseline} is {number(rounding, 'nats')}: more than rounding explains."
        for row in matrix.rows
        if (served := row.record.served) is not None and served.served_kl.low > most
    )


def _speed_notes(matrix: Matrix) -> list[str]:
    """The models that speed was measured on, one sentence for each kind."""
    models: dict[Timed, set[str]] = {}
    for row in matrix.rows:
        if row.speed and row.speed.twin:
            models.setdefault(row.speed.timed, set()).add(row.speed.twin)
    found = []
    for timed, described in models.items():
        words = f"{TIMED_WORDS[timed].meaning} ({'; '.join(sorted(described))})"
        if timed == "artifact":
            found.append(f"Speed is measured on {words}, interleaved with the same model in float16.")
        else:
            found.append(
                "Speed does not depend on the values of the weights, except for the choice of experts, which is the same in "
                f"every twin; it is measured on {words}, interleaved with FP16's."
            )
    return found


def notes(matrix: Matrix) -> tuple[str, ...]:
    """Explanations that a reader of the tables needs."""
    found = [INTERVALS]
    foreign = [(row.variant, row.record.foreign) for row in matrix.rows if row.record.foreign is not None]
    if foreign:
        named = "; ".join(
            f"{name} ({one.method}; {one.producer or 'its files name no program'})" for name, one in foreign
        )
        found.append(f"Made by other tools, only measured by quantlab: {named}.")
    if any(tested(row) for row in matrix.rows):
        found.append(HOLM_NOTE)
    if any(row.noise for row in matrix.rows):
        found.append(
            "Measurements of speed that were disturbed are marked noisy; a recommendation rests on the lower end of their intervals."
        )
    found += _speed_notes(matrix)
    plain = [(row.variant, row.speed.not_fused) for row in matrix.rows if row.speed and row.speed.not_fused]
    for reason in sorted({reason for _, reason in plain}):
        slow = ", ".join(variant for variant, why in plain if why == reason)
        found.append(f"Decode steps of {slow} ran transformers' forward functions and were not fused: {reason}.")
    if any(one.operation == "prune" for row in matrix.rows for one in row.record.passes):
        found.append(PRUNED_NOTE)
    dtypes = sorted({row.quality.compute_dtype for row in matrix.rows if row.quality})
    if len(dtypes) > 1:
        found.append(f"Quality was measured with different compute dtypes: {', '.join(dtypes)}.")
    if len({tuple(sorted(row.record.versions.items())) for row in matrix.rows}) > 1:
        found.append(
            "The rows were measured with different versions of the software; see the versions of each row in matrix.json."
        )
    substitutes = dict.fromkeys(
        phrase for row in matrix.rows for phrase in (row.quality.operators[1:] if row.quality else ())
    )
    found += [f"The processor that measured quality computed {phrase}." for phrase in substitutes]
    found += [
        _expanded(row, fallback)
        for row in matrix.rows
        for fallback in (row.memory.expanded if row.memory else ())
        if row.variant != "source"
    ]
    return tuple(found)


def _expanded(row: Row, fallback: Expanded) -> str:
    """The note on matrices that the runtime expands. The source is excluded, because it is always expanded."""
    when = "for every product" if fallback.held == "packed" else "to 16 bits when they are loaded"
    count = f"{fallback.count:,} {fallback.format} matrices"
    return f"{row.variant}: {count} are expanded {when}: {'; '.join(fallback.reasons)}."


def _signed(text: str) -> str:
    """Replace the hyphen with a minus sign, and remove it before a zero."""
    digits = text.removeprefix("-")
    if not digits.strip("0.,"):
        return digits
    return text if digits == text else "−" + digits
