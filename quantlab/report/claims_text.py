"""Checked claims as text, for every kind of table."""

from dataclasses import dataclass
from typing import Final, Literal

from quantlab.evaluation.record import Measured
from quantlab.report.cells import interval, number
from quantlab.report.claims import NAMES, CheckedClaim, Verdict
from quantlab.report.matrix import Matrix

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


@dataclass(frozen=True)
class ClaimsTable:
    title: str
    heads: tuple[str, ...]
    lines: tuple[ClaimLine, ...]


def claims_table(matrix: Matrix) -> ClaimsTable | None:
    """The claims of a matrix with their verdicts; None where there are none."""
    if matrix.claims is None:
        return None
    heads = ("claim", "claimed", "measured here", "verdict", "what was measured")
    return ClaimsTable(matrix.claims.title, heads, tuple(_line(claim) for claim in matrix.claims.claims))


def _line(claim: CheckedClaim) -> ClaimLine:
    mood, sign = _MOODS[claim.verdict]
    what = ", ".join(part for part in (NAMES[claim.metric], claim.variant) if part) if claim.metric else ""
    note = "; ".join(part for part in (what, claim.note) if part)
    return ClaimLine(claim.text, claim.claimed, _measured(claim), claim.verdict, mood, sign, note)


def _measured(claim: CheckedClaim) -> str:
    if claim.value is None:
        return "–"
    if isinstance(claim.value, Measured):
        return f"{number(claim.value.value, 'change')} ({interval(claim.value, 'change')})"
    return number(claim.value, "change")
