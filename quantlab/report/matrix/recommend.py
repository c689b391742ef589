"""Recommendations: one sentence each for quality, memory and speed, with no statement that the intervals do not support.

An interval that reaches zero does not prove that nothing was lost, only that no loss was detected. So a row counts as keeping the
quality only if its interval also excludes a relevant loss, and the sentence states both ends. Overlapping intervals are reported
as such. A row without quality numbers is never recommended, because its outputs may be useless.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from quantlab.evaluation.measured import Measured
from quantlab.report.comparison.paired import paired
from quantlab.report.matrix.matrix import Matrix
from quantlab.report.matrix.row_verdicts import verdicts
from quantlab.report.matrix.rows import Row, metric, noise_of, same_layout
from quantlab.report.matrix.table_cells import interval, number

_RISE: Final = "perplexity_change_percent"
NEGLIGIBLE_PERCENT = 0.1
"""A perplexity change surely below this percentage counts as equal, even if it is measurable."""
EXCLUDED_PERCENT = 1.0
"""A row keeps the quality only if its interval excludes a perplexity rise above this percentage."""
BOUND_PERCENT = 5.0
"""A row is recommended for memory or speed only if its accuracy loss and perplexity rise are surely below this percentage."""
SAME_MEMORY_POINTS = 0.5
"""Rows within this difference, in percent of FP16, count as having the same memory."""

RULES = {
    "quality": "The least memory among variants without a measurable loss of accuracy or in a task and whose perplexity is not measurably above the baseline's "
    f"(or surely at most {NEGLIGIBLE_PERCENT:g} % above it), if the interval excludes a rise of more than {EXCLUDED_PERCENT:g} %.",
    "memory": f"The least memory among variants whose intervals keep accuracy loss and perplexity rise below {BOUND_PERCENT:g} %. Among "
    "variants of equal memory, the one with the smallest possible loss; of equal layout, the one with fewer passes if no difference is measurable.",
    "speed": f"The fastest decode at batch size 1 among variants whose intervals keep accuracy loss and perplexity rise below {BOUND_PERCENT:g} %; "
    "among variants with overlapping speeds, the one with the smallest possible loss, or with fewer passes as above. A speed marked noisy "
    "counts as the lower end of its interval.",
}
"""The rule of each goal, in words."""


@dataclass(frozen=True)
class Recommendation:
    """The recommended variant for one goal."""

    goal: Literal["quality", "memory", "speed"]
    variant: str | None
    """None if no row can be recommended."""
    sentence: str


@dataclass(frozen=True)
class _Judged:
    """A row with the numbers that decide on its quality."""

    row: Row
    loss: Measured
    rise: Measured

    @property
    def memory(self) -> float | None:
        return self.row.number("memory_percent_of_fp16")

    @property
    def passes(self) -> int:
        return len(self.row.record.passes)

    @property
    def worst(self) -> float:
        """Upper end of the perplexity change's interval: the largest rise that is not excluded."""
        return self.rise.high

    @property
    def keeps_quality(self) -> bool:
        lost = {name for name, verdict in verdicts(self.row).items() if verdict == "loss"}
        if self.rise.high <= NEGLIGIBLE_PERCENT:
            lost.discard("perplexity")
        return not lost and self.rise.high <= EXCLUDED_PERCENT

    @property
    def lost_nothing(self) -> bool:
        return "loss" not in verdicts(self.row).values()

    @property
    def is_bounded(self) -> bool:
        return self.loss.high <= BOUND_PERCENT and self.rise.high <= BOUND_PERCENT

    @property
    def losses(self) -> str:
        return f"accuracy loss {_with_interval(self.loss)}, perplexity change {_with_interval(self.rise)}"


def recommend(matrix: Matrix) -> tuple[Recommendation, Recommendation, Recommendation]:
    """The recommendations for quality, memory and speed."""
    compared = [(row, row.measured("accuracy_loss_percent"), row.measured(_RISE)) for row in matrix.rows]
    judged = [
        _Judged(row=row, loss=loss, rise=rise)
        for row, loss, rise in compared
        if row.variant != matrix.baseline and loss is not None and rise is not None
    ]
    return (
        _with_absent(_for_quality(matrix, judged), matrix, judged=judged, need="memory"),
        _with_absent(_for_memory(judged), matrix, judged=judged, need="memory"),
        _with_absent(_for_speed(judged), matrix, judged=judged, need="speed"),
    )


def _with_absent(
    found: Recommendation, matrix: Matrix, *, judged: Sequence[_Judged], need: Literal["memory", "speed"]
) -> Recommendation:
    """Add the rows that could not be considered because a number is missing."""
    key = "memory_percent_of_fp16" if need == "memory" else "speed_over_fp16"
    present = {other.row.variant for other in judged if other.row.value(key) is not None} | {matrix.baseline}
    absent = [row.variant for row in matrix.rows if row.variant not in present]
    if not absent:
        return found
    return replace(found, sentence=f"{found.sentence} Not considered, for want of numbers: {_listed(absent)}.")


def _for_quality(matrix: Matrix, judged: Sequence[_Judged]) -> Recommendation:
    if not judged:
        return Recommendation(
            "quality", None, "No variant can be recommended: the quality of none was measured against the baseline."
        )
    keeping = [(found.memory, found) for found in judged if found.keeps_quality]
    weighed = [(memory, found) for memory, found in keeping if memory is not None]
    if weighed:
        memory, pick = _smallest(weighed)
        saving = (
            f"at {number(memory, 'percent')} % of FP16's weight memory"
            if _saves(memory)
            else "though it saves no memory over FP16"
        )
        seen = (
            "no measurable loss"
            if pick.lost_nothing
            else f"a perplexity surely within {NEGLIGIBLE_PERCENT:g} % of the baseline's"
        )
        sentence = f"{pick.row.variant} is the smallest variant with {seen} over {pick.rise.n:,} tokens: {pick.losses}, {saving}"
        return Recommendation("quality", pick.row.variant, sentence + _same_memory(pick, memory, weighed) + ".")
    if keeping:
        names = _listed(found.row.variant for _, found in keeping)
        return Recommendation("quality", None, f"{names} kept the quality, but no memory was measured to choose by.")
    best = min(judged, key=lambda found: found.rise.value)
    rivals = [found.row.variant for found in judged if found is not best and not _differs(best, found)]
    overlap = f" (not measurably better than {_listed(rivals)})" if rivals else ""
    return Recommendation(
        "quality",
        matrix.baseline,
        f"Stay with {matrix.baseline}: no variant is shown to keep its quality; closest is {best.row.variant}{overlap} with {best.losses}.",
    )


def _for_memory(judged: Sequence[_Judged]) -> Recommendation:
    weighed = [(found.memory, found) for found in judged]
    saving = [(memory, found) for memory, found in weighed if memory is not None and _saves(memory)]
    if not saving:
        return Recommendation(
            "memory", None, "No variant with measured quality needs less memory for weights than FP16."
        )
    bounded = [(memory, found) for memory, found in saving if found.is_bounded]
    if not bounded:
        memory, least = _smallest(saving)
        return Recommendation(
            "memory",
            None,
            f"No variant saves memory with its losses surely below {BOUND_PERCENT:g} %; the smallest is {least.row.variant} "
            f"at {number(memory, 'percent')} % of FP16 with {least.losses}.",
        )
    memory, pick = _smallest(bounded)
    sentence = f"{pick.row.variant} holds its weights in {number(memory, 'percent')} % of FP16's memory ({100 / memory:.1f}× less) with {pick.losses}"
    sentence += _same_memory(pick, memory, bounded)
    smaller = [found for other, found in saving if not found.is_bounded and other < memory - SAME_MEMORY_POINTS]
    if smaller:
        sentence += f"; {_listed(found.row.variant for found in smaller)} would be smaller, but a loss above {BOUND_PERCENT:g} % is not ruled out"
    return Recommendation("memory", pick.row.variant, sentence + ".")


@dataclass(frozen=True)
class _Timed:
    """A row with its speed at batch size 1; `noise` is the reason why it is noisy."""

    judged: _Judged
    speed: Measured
    noise: str | None

    @property
    def sure(self) -> float:
        """The speed used for ranking: the lower end of the interval if the measurement is noisy, else the value."""
        return self.speed.low if self.noise else self.speed.value

    def is_level_with(self, top: "_Timed") -> bool:
        """Whether it may be as fast as the fastest; a noisy measurement, whose interval is wide, only if it surely is."""
        return (self.speed.low if self.noise else self.speed.high) >= top.speed.low

    @property
    def sentence(self) -> str:
        speed, ends = self.speed, interval(self.speed, "ratio")
        if self.noise is None:
            return f"decodes {number(speed.value, 'ratio')}× as fast as FP16 ({ends}) at batch size 1"
        return f"decodes at least {at_least(speed)}× as fast as FP16 ({ends}, noisy: {self.noise}) at batch size 1"


def at_least(speed: Measured) -> str:
    """The lower end of an interval, rounded down to one digit."""
    return f"{math.floor(10 * speed.low) / 10:.1f}"


def _for_speed(judged: Sequence[_Judged]) -> Recommendation:
    timed = [
        _Timed(found, speed, noise_of(found.row, "speed_over_fp16"))
        for found in judged
        if found.is_bounded and (speed := found.row.measured("speed_over_fp16")) is not None
    ]
    faster = [one for one in timed if one.speed.low > 1]
    if not faster:
        seen = "is measurably faster than FP16 at batch size 1" if timed else "has a measured speed"
        noisy = ", measured on a machine that was disturbed" if any(one.noise for one in timed) else ""
        sentence = f"No variant with losses surely below {BOUND_PERCENT:g} % {seen}{noisy}."
        return Recommendation("speed", None, sentence)
    top = max(faster, key=lambda one: one.sure)
    level = [one for one in faster if one is top or one.is_level_with(top)]
    best = min(level, key=lambda one: (one.judged.worst, -one.sure))
    simplest = _simplest(best.judged, [one.judged for one in level])
    pick = next(one for one in level if one.judged is simplest)
    alike = [one for one in level if _is_alike(pick.judged, one.judged)]
    sentence = f"{pick.judged.row.variant} {pick.sentence}"
    batch, ratio = _largest_batch(pick.judged.row)
    if ratio is not None:
        sentence += f" and {number(ratio.value, 'ratio')}× ({interval(ratio, 'ratio')}) at {batch}"
    sentence += f", with {pick.judged.losses}" + "".join(_why_not(pick.judged, one.judged) for one in alike)
    sentence += _other_speeds(pick, top, [one for one in level if one not in (pick, top, *alike)], told=top in alike)
    maybe = [
        one.judged.row.variant for one in timed if one.noise and one not in level and one.speed.high > top.speed.high
    ]
    if maybe:
        sentence += f"; {_listed(maybe)} may be faster, but the measurement was disturbed"
    return Recommendation("speed", pick.judged.row.variant, sentence + ".")


def _other_speeds(pick: _Timed, top: _Timed, others: Sequence[_Timed], *, told: bool) -> str:
    """Clauses on the fastest row, if it was not picked, and on rows whose intervals overlap with its interval."""
    sentence = ""
    if pick is not top and not told:
        measures = f"measures {number(top.speed.value, 'ratio')}×" + (" (noisy)" if top.noise else "")
        sentence = (
            f"; {top.judged.row.variant} {measures}, but the intervals overlap and more loss remains possible there"
        )
    if others:
        intervals = "interval of {} overlaps" if len(others) == 1 else "intervals of {} overlap"
        sentence += f"; the {intervals.format(_listed(one.judged.row.variant for one in others))} with the fastest's"
    return sentence


def _smallest(weighed: Sequence[tuple[float, _Judged]]) -> tuple[float, _Judged]:
    """The row with the least memory; among rows of the same memory the one with the smallest possible loss, or a simpler equal one."""
    least = min(memory for memory, _ in weighed)
    same = [(memory, found) for memory, found in weighed if memory - least <= SAME_MEMORY_POINTS]
    _, best = min(same, key=lambda pair: pair[1].worst)
    pick = _simplest(best, [found for _, found in same])
    return next((memory, found) for memory, found in same if found is pick)


def _simplest(best: _Judged, others: Iterable[_Judged]) -> _Judged:
    """`best`, or a row of the same layout with fewer passes, if no difference between the two is measurable."""
    as_good = [found for found in others if _is_alike(found, best)]
    return min([best, *as_good], key=lambda found: (found.passes, found.worst))


def _is_alike(simpler: _Judged, other: _Judged) -> bool:
    """Whether `other` has more passes but no measurable difference. Other tools' artifacts have no passes to count."""
    if simpler.row.record.foreign is not None or other.row.record.foreign is not None:
        return False
    if not same_layout(simpler.row, other.row) or simpler.passes >= other.passes:
        return False
    return not _differs(simpler, other)


def _differs(a: _Judged, b: _Judged) -> bool:
    """Whether their perplexity changes differ measurably; if they cannot be paired, their intervals must not overlap."""
    difference = _difference(a, b)
    if difference is None:
        return a.rise.low > b.rise.high or b.rise.low > a.rise.high
    return not difference.low <= 0 <= difference.high


def _difference(a: _Judged, b: _Judged) -> Measured | None:
    """Difference of their perplexity changes on the same documents."""
    return paired(a.row.documents, b.row.documents, metric(_RISE))


def _why_not(pick: _Judged, other: _Judged) -> str:
    difference = _difference(pick, other)
    how = "unpaired" if difference is None else f"{_with_interval(difference)} on the same documents"
    return (
        f"; {other.row.variant} has the same layout and {other.passes} passes in place of {pick.passes}, and no "
        f"measurable difference of perplexity change ({how})"
    )


def _same_memory(pick: _Judged, memory: float, weighed: Sequence[tuple[float, _Judged]]) -> str:
    """A clause for each row of the same memory that was not picked because of its quality."""
    same = [found for other, found in weighed if found is not pick and abs(other - memory) <= SAME_MEMORY_POINTS]
    return "".join(
        _why_not(pick, found)
        if _is_alike(pick, found)
        else f"; {found.row.variant} takes about the same memory with a perplexity change of {_with_interval(found.rise)}"
        for found in same
    )


def _saves(memory: float) -> bool:
    return memory <= 100 - SAME_MEMORY_POINTS


def _largest_batch(row: Row) -> tuple[str, Measured | None]:
    """The largest batch size above 1 whose decode speed was compared with FP16."""
    measured = [
        (batch, ratio)
        for batch, ratio in row.by_batch("decode_over_fp16").items()
        if batch != "1" and not noise_of(row, f"decode_over_fp16.{batch}")
    ]
    return measured[-1] if measured else ("", None)


def _with_interval(measured: Measured) -> str:
    return f"{number(measured.value, 'change')} % ({interval(measured, 'change')})"


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
