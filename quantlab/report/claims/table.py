"""Checked claims as text, for every kind of table."""

from dataclasses import dataclass
from typing import Final, Literal

from quantlab.evaluation.measured import Measured
from quantlab.report.claims.check import KEPT, NAMES, SAVED, CheckedClaim, Verdict
from quantlab.report.matrix.columns import columns
from quantlab.report.matrix.matrix import Matrix
from quantlab.report.matrix.rows import link_to
from quantlab.report.matrix.table_cells import interval, number

Mood = Literal["good", "bad", "plain"]
_MOODS: Final[dict[Verdict, tuple[Mood, str]]] = {
    "holds": ("good", "✓"),
    "better": ("good", "▲"),
    "does not hold": ("bad", "▼"),
    "not decided": ("plain", "?"),
    "not measured here": ("plain", "–"),
}


@dataclass(frozen=True)
class ClaimLine:
    text: str
    claimed: str
    measured: str
    verdict: Verdict
    mood: Mood
    sign: str
    note: str
    href: str | None
    """Link to the measured number in its record."""


@dataclass(frozen=True)
class ClaimsTable:
    title: str
    heads: tuple[str, ...]
    lines: tuple[ClaimLine, ...]


def claims_table(matrix: Matrix) -> ClaimsTable | None:
    """The claims of a matrix with their verdicts; None if there are none."""
    if matrix.claims is None:
        return None
    heads = ("claim", "claimed", "measured here", "verdict", "what was measured")
    return ClaimsTable(matrix.claims.title, heads, tuple(_line(claim, matrix) for claim in matrix.claims.claims))


def _line(claim: CheckedClaim, matrix: Matrix) -> ClaimLine:
    mood, sign = _MOODS[claim.verdict]
    what = ", ".join(part for part in (NAMES[claim.metric], claim.variant) if part) if claim.metric else ""
    note = "; ".join(part for part in (what, claim.note) if part)
    return ClaimLine(claim.text, claim.claimed, _measured(claim), claim.verdict, mood, sign, note, _link(claim, matrix))


def _link(claim: CheckedClaim, matrix: Matrix) -> str | None:
    """Link to the variant's record, or to the baseline's for long contexts."""
    if claim.value is None or claim.metric is None:
        return None
    name = matrix.baseline if claim.metric == SAVED else claim.variant
    key = "accuracy_loss_percent" if claim.metric == KEPT else claim.metric
    fields = {column.key: column.field for column in columns(matrix)} | {SAVED: "attention.cells"}
    return next((link_to(row, fields.get(key, "")) for row in matrix.rows if row.variant == name), None)


def _measured(claim: CheckedClaim) -> str:
    if claim.value is None:
        return "–"
    if isinstance(claim.value, Measured):
        return f"{number(claim.value.value, 'change')} ({interval(claim.value, 'change')})"
    return number(claim.value, "change")
