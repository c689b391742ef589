"""Check of published claims against a matrix: the claims are data, the verdicts follow from intervals.

A claimed number holds if the interval, widened by the claim's tolerance, contains it and is narrow enough. If the whole interval
is better than the number, the claim is too modest; if it is worse, the claim does not hold. A bound holds only if the whole
interval satisfies it.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Self

from pydantic import Field, model_validator

from quantlab.documents import load_document
from quantlab.errors import RecipeError
from quantlab.evaluation.measured import Frozen, Measured
from quantlab.evaluation.record import Attention
from quantlab.report.comparison.paired import paired
from quantlab.report.comparison.unpaired import exact, subtract
from quantlab.report.matrix.rows import METRICS, Row, metric, noise_of

KEPT, SAVED = "accuracy_kept_percent", "attention_memory_saved_percent"
NAMES: Final[Mapping[str, str]] = {
    **{name: declared.metric.claim for name, (_, declared) in METRICS.items() if declared.metric.claim},
    KEPT: "next-token accuracy kept, %",
    SAVED: "peak above the weights while a context is read, saved against eager attention, %",
}
"""Numbers that claims may refer to: metrics that declare a claim name, and two that are computed here."""
if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = Literal[tuple(NAMES)]
Verdict = Literal["holds", "better", "does not hold", "not decided", "not measured here"]

_VAGUE = 0.3
"""An interval wider than this share of the claimed number is too wide to confirm it."""


class Claim(Frozen):
    """One claim about a metric of the matrix or a number measured elsewhere; without either it is shown but not checked."""

    text: str = Field(min_length=1)
    """The claim in one line of text."""
    variant: str | None = None
    metric: MetricName | None = None
    attention: str | None = None
    """For `attention_memory_saved_percent`, instead of a variant: the implementation that is compared with `eager`."""
    context: int | None = None
    """Context length of the comparison, in tokens."""
    measured: float | None = None
    """A measured number that no record holds, from `source`."""
    source: str | None = None
    """The file of eval/results that holds it."""
    equals: float | None = None
    """The claimed number; exactly one of this field and the next three is given."""
    at_most: float | None = None
    at_least: float | None = None
    better_than: str | None = None
    """Name of another variant."""
    tolerance: float = Field(default=0.0, ge=0)
    """Rounding of the claimed number in its own unit: half a unit of its last printed digit."""
    note: str = ""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        said = [each for each in (self.equals, self.at_most, self.at_least, self.better_than) if each is not None]
        of_attention = self.metric == SAVED
        if not (self.attention is not None) == (self.context is not None) == of_attention:
            raise ValueError(
                "`attention` and `context` belong to `metric: attention_memory_saved_percent`, and it to them"
            )
        if (self.measured is None) != (self.source is None) or (self.measured is not None and self.metric is not None):
            raise ValueError(
                "a number measured elsewhere needs its source; give `measured` and `source`, and no `metric`"
            )
        if self.measured is not None:
            if len(said) != 1 or self.better_than is not None or self.equals is not None:
                raise ValueError("a claim does not say what it claims; give one of at_most, at_least")
            return self
        if self.metric is None and (said or self.variant):
            raise ValueError("a claim without a metric cannot be checked; add `metric: …`")
        whole = len(said) == 1 and (self.variant is None) == of_attention and not (of_attention and self.better_than)
        if self.metric is not None and not whole:
            raise ValueError(
                "a claim does not say what it claims; give `variant` and one of equals, at_most, at_least, better_than"
            )
        return self


class Claims(Frozen):
    """The contents of a file of claims."""

    title: str = Field(min_length=1)
    claims: tuple[Claim, ...] = Field(min_length=1)


class CheckedClaim(Frozen):
    """A claim with the measured number and the verdict."""

    text: str
    variant: str | None
    metric: MetricName | None
    claimed: str
    value: Measured | float | None
    """The measured number; for `better_than` the difference to the other variant."""
    verdict: Verdict
    note: str


class CheckedClaims(Frozen):
    """All checked claims of a file."""

    title: str
    claims: tuple[CheckedClaim, ...]


def load_claims(path: Path) -> tuple[Claims, str]:
    """Read a file of claims; returns the claims and the text of the file.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or is not a list of claims.
    """
    claims, content = load_document(path, Claims, kind="list of claims")
    return claims, content.decode()


def check_claims(
    claims: Claims, rows: Sequence[Row], *, baseline: str, attention: Attention | None = None
) -> CheckedClaims:
    """Check every claim against the rows of a matrix.

    Args:
        claims: the claims of a file.
        rows: the rows of the matrix.
        baseline: the variant that losses are relative to.
        attention: long contexts by implementation; None if they were not measured.

    Raises:
        RecipeError: a claim is about a variant that has no row in the matrix.
    """
    by_name = {row.variant: row for row in rows}
    for claim in claims.claims:
        for name in (claim.variant, claim.better_than):
            if name is not None and name not in by_name:
                raise RecipeError(
                    "a claim is about a variant that is not in the matrix",
                    where=claim.text,
                    found=f"`{name}`",
                    fix=f"use one of: {', '.join(by_name)}",
                )
    return CheckedClaims(
        title=claims.title,
        claims=tuple(
            _check_attention(claim, attention)
            if claim.attention is not None
            else _check(claim, by_name, baseline=baseline)
            for claim in claims.claims
        ),
    )


def _said(claim: Claim, verdict: Verdict, value: Measured | float | None, more: str = "") -> CheckedClaim:
    return CheckedClaim(
        text=claim.text,
        variant=claim.variant,
        metric=claim.metric,
        claimed=_claimed(claim),
        value=value,
        verdict=verdict,
        note="; ".join(part for part in (claim.note, more) if part),
    )


def _check_attention(claim: Claim, attention: Attention | None) -> CheckedClaim:
    """Check a claim about attention memory. Peaks are measured once, so their ratio has no interval."""
    cells = attention.cells if attention else ()
    peaks = {cell.implementation: cell.prefill_peak_bytes for cell in cells if cell.context == claim.context}
    ours, eager = peaks.get(str(claim.attention)), peaks.get("eager")
    what = f"{claim.attention} at {claim.context:,} tokens"
    if ours is None or not eager:
        return _said(claim, "not measured here", None, what)
    saved = 100 * (1 - ours / eager)
    if claim.equals is not None:
        return _said(claim, _equals(exact(-saved), -claim.equals, claim.tolerance), saved, what)
    return _said(claim, _bounded(claim, exact(saved)), saved, what)


def _check(claim: Claim, rows: dict[str, Row], *, baseline: str) -> CheckedClaim:
    said = partial(_said, claim)
    if claim.measured is not None:
        return said(_bounded(claim, exact(claim.measured)), claim.measured, str(claim.source))
    if claim.metric is None or claim.variant is None:
        return said("not measured here", None)
    row = rows[claim.variant]
    found = _value(row, claim.metric, baseline=baseline)
    if found is None:
        return said("not measured here", None)
    noise = noise_of(row, claim.metric)
    if noise:
        return said("not decided", found, f"noisy: {noise}")
    sign = -1.0 if _is_better_high(claim.metric) else 1.0
    if claim.better_than is not None:
        other = _value(rows[claim.better_than], claim.metric, baseline=baseline)
        if other is None:
            return said("not measured here", None)
        same_items = _paired(row, rows[claim.better_than], claim.metric)
        difference = same_items or subtract(exact(found), exact(other))
        more = f"difference to {claim.better_than}"
        of_baseline = baseline in (claim.variant, claim.better_than)  # losses are already paired with the baseline
        if _lost(claim.metric) and same_items is None and not of_baseline:
            return said("not decided", difference, f"{more}, unpaired")
        return said(_at_most(_times(difference, sign), 0.0), difference, more)
    measured = _times(exact(found), sign)
    if claim.equals is not None:
        return said(_equals(measured, sign * claim.equals, claim.tolerance), found)
    return said(_bounded(claim, exact(found)), found)


def _lost(name: str) -> str:
    """Name of the loss against the baseline that a claim refers to; empty for other metrics."""
    name = "accuracy_loss_percent" if name == KEPT else name
    return name if name in METRICS and metric(name).loss else ""


def _is_better_high(name: str) -> bool:
    return name in (KEPT, SAVED) or metric(name).better == "high"


def _paired(row: Row, other: Row, name: str) -> Measured | None:
    """The number of `row` minus that of `other` on the same documents; None if they do not both hold their sums."""
    lost = _lost(name)
    if not lost:
        return None
    found = paired(other.documents, row.documents, metric(lost))
    return _times(found, -1.0) if found and name == KEPT else found


def _claimed(claim: Claim) -> str:
    if claim.equals is not None:
        return f"{claim.equals:g}"
    if claim.at_most is not None:
        return f"≤ {claim.at_most:g}"
    if claim.at_least is not None:
        return f"≥ {claim.at_least:g}"
    return f"better than {claim.better_than}" if claim.better_than else "–"


def _equals(measured: Measured, claimed: float, tolerance: float) -> Verdict:
    """The verdict on a claimed number of which less is better."""
    if measured.low > claimed + tolerance:
        return "does not hold"
    if measured.high < claimed - tolerance:
        return "better"
    return "not decided" if measured.high - measured.low > 2 * tolerance + _VAGUE * abs(claimed) else "holds"


def _bounded(claim: Claim, found: Measured) -> Verdict:
    if claim.at_most is not None:
        return _at_most(found, claim.at_most)
    assert claim.at_least is not None, "checked when the claim was read"
    return _at_most(_times(found, -1.0), -claim.at_least)


def _at_most(measured: Measured, bound: float) -> Verdict:
    if measured.high <= bound:
        return "holds"
    return "does not hold" if measured.low > bound else "not decided"


def _value(row: Row, name: str, *, baseline: str) -> Measured | float | None:
    """The number that a claim refers to; a baseline's loss against itself is exactly zero."""
    lost = _lost(name)
    is_baseline = row.variant == baseline and row.quality is not None
    found = 0.0 if lost and is_baseline else row.value(lost or name)
    return found if found is None or name != KEPT else subtract(exact(100.0), exact(found))


def _times(measured: Measured, sign: float) -> Measured:
    ends = sorted((sign * measured.low, sign * measured.high))
    return Measured(value=sign * measured.value, low=ends[0], high=ends[1], n=measured.n)
