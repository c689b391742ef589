"""Error bars, all by resampling.

**Text.** Tokens of one document are alike, so the unit that is drawn is the document: 2,000 times, as many documents as
there are, with replacement, domain by domain (the domains' shares are the suite's choice, not chance). Every number of
the quality table is a function of sums over documents, so a draw is a vector of counts, all draws are one matrix product
and a difference to the baseline is paired by construction: both sides are summed over the same drawn documents.

**Percentiles** of tokens (the median KL, its 99th) are taken of the tokens of each draw, again document by document.

**Is it chance?** p inverts the interval beside it: the largest level at which the interval still covers zero. Items that are
right or wrong have an exact test of their own, McNemar's. Several rows are held against one baseline, so p is corrected
for their number as in S. Holm, "A simple sequentially rejective multiple test procedure" (1979).

**Timings.** The unit is a round, the value the median, because a busy machine makes single rounds slow, never fast.

Percentile intervals come out too narrow when units are few: they leave out the factor sqrt(n/(n-1)) and Student's tails.
The quantiles are widened for both, as in T. Hesterberg, "What Teachers Should Know About the Bootstrap" (2014,
arXiv 1411.5279), "expanded percentile" intervals.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from quantlab.evaluation.record import Measured, Significance, Verdict

Floats = NDArray[np.float64]
RESAMPLES = 2000
_SEED = 0
_NORMAL = NormalDist()
_CANDIDATES = 4000


@dataclass(frozen=True)
class Resampled:
    """Sums over documents, and the same sums over many draws of documents.

    Attributes:
        totals: sums over all documents [C].
        draws: sums over each draw [R, C].
        units: how many documents there are.
        degrees: that less the number of strata: every stratum spends one on its mean.
    """

    totals: Floats
    draws: Floats
    units: int
    degrees: int

    def measure(self, statistic: Callable[[Floats], Floats], *, n: int) -> Measured:
        """A number that is a function of sums.

        Args:
            statistic: takes sums [..., C] to values [...].
            n: the count to report.
        """
        low, high = _percentile_interval(statistic(self.draws), units=self.units, degrees=self.degrees)
        return Measured(value=float(statistic(self.totals)), low=low, high=high, n=n)

    def compare(self, statistic: Callable[[Floats], Floats], *, n: int) -> tuple[Measured, Significance]:
        """A difference to the baseline that is a function of sums, positive where the artifact is worse."""
        measured = self.measure(statistic, n=n)
        p = _inverted(statistic(self.draws), units=self.units, degrees=self.degrees)
        return measured, Significance(p=p, verdict=verdict(measured))


def resample(table: Floats, strata: NDArray[np.int64]) -> Resampled:
    """Draw rows of `table` with replacement, as many of each stratum as there are.

    Args:
        table: what each document adds to each sum [D, C].
        strata: the stratum (domain) of each document [D].
    """
    present = np.unique(strata)
    by_stratum = [table[strata == stratum] for stratum in present]
    draws = sum((_counts(len(rows), index) @ rows for index, rows in enumerate(by_stratum)), np.zeros(1))
    return Resampled(table.sum(axis=0), draws, units=len(table), degrees=len(table) - len(present))


@functools.lru_cache(maxsize=64)
def _counts(units: int, stratum: int) -> Floats:
    """How often each of `units` units comes in each draw [R, units]; the same for every artifact."""
    generator = np.random.default_rng((_SEED, stratum))
    return generator.multinomial(units, np.full(units, 1 / units), size=RESAMPLES).astype(np.float64)


def percentile(values: Floats, documents: NDArray[np.int64], strata: NDArray[np.int64], *, share: float) -> Measured:
    """A percentile of tokens, with its interval over documents.

    Args:
        values: one of each token [T].
        documents: the document of each token, as an index into `strata` [T].
        strata: the stratum (domain) of each document [D]; documents without tokens do not count.
        share: 0.5 for the median, at least that.
    """
    order = np.argsort(values, kind="stable")
    # the draws' percentiles lie among the largest values; three times what is above is far more than chance moves them
    first = max(int(len(values) * (1 - 3 * (1 - share))), 0)
    ranks = np.unique(np.linspace(first, len(values) - 1, _CANDIDATES).astype(np.int64))
    above = np.zeros((len(ranks) + 1, len(strata)))
    np.add.at(above, (np.searchsorted(ranks, np.arange(len(values))), documents[order]), 1.0)
    above = above[:0:-1].cumsum(axis=0)[::-1]  # tokens of each document above each candidate [C, D]
    tokens = np.bincount(documents, minlength=len(strata))
    counts, degrees = _drawn_documents(strata, tokens > 0)
    allowed = (1 - share) * (counts @ tokens)
    low, high = np.zeros(RESAMPLES, dtype=np.int64), np.full(RESAMPLES, len(ranks) - 1)
    while (low < high).any():  # bisection: the first candidate with few enough tokens above it, of every draw at once
        middle = (low + high) // 2
        enough = np.einsum("rd,rd->r", counts, above[middle]) <= allowed
        low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
    samples = values[order][ranks][low]
    units = int((tokens > 0).sum())
    bounds = _percentile_interval(samples, units=units, degrees=degrees)
    value = values[order][math.ceil(share * len(values)) - 1]
    return Measured(value=float(value), low=bounds[0], high=bounds[1], n=len(values))


def _drawn_documents(strata: NDArray[np.int64], seen: NDArray[np.bool_]) -> tuple[Floats, int]:
    """How often each document comes in each draw of `resample` [R, D], and the degrees of freedom."""
    counts = np.zeros((RESAMPLES, len(strata)))
    present = np.unique(strata[seen])
    for index, stratum in enumerate(present):
        rows = np.flatnonzero(seen & (strata == stratum))
        counts[:, rows] = _counts(len(rows), index)
    return counts, int(seen.sum()) - len(present)


def verdict(loss: Measured) -> Verdict:
    """What a paired loss, positive where the artifact is worse, says."""
    if loss.low <= 0 <= loss.high:
        return "no measurable loss"
    return "loss" if loss.low > 0 else "gain"


def mcnemar(to_wrong: int, to_right: int) -> float:
    """Two-sided exact p of McNemar's test: would a coin part the items that changed sides so unevenly?"""
    flips, fewer = to_wrong + to_right, min(to_wrong, to_right)
    logs = [math.lgamma(flips + 1) - math.lgamma(k + 1) - math.lgamma(flips - k + 1) for k in range(fewer + 1)]
    tail = math.fsum(math.exp(log - flips * math.log(2)) for log in logs)
    return min(1.0, 2 * tail)


def holm(values: Sequence[float]) -> list[float]:
    """p values adjusted for their number: reject where the adjusted p is at most the level."""
    adjusted, largest = [0.0] * len(values), 0.0
    for step, index in enumerate(sorted(range(len(values)), key=lambda index: values[index])):
        largest = max(largest, min(1.0, (len(values) - step) * values[index]))
        adjusted[index] = largest
    return adjusted


def median(values: Floats) -> Measured:
    """The median of repeated timings [n] with its interval; with fewer than three, their range."""
    if len(values) < 3:
        return Measured(
            value=float(np.median(values)), low=float(values.min()), high=float(values.max()), n=len(values)
        )
    drawn = np.random.default_rng(_SEED).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = _percentile_interval(np.median(values[drawn], axis=1), units=len(values), degrees=len(values) - 1)
    return Measured(value=float(np.median(values)), low=low, high=high, n=len(values))


def _percentile_interval(samples: Floats, *, units: int, degrees: int) -> tuple[float, float]:
    """The expanded 95 % percentile interval of bootstrap samples [R]."""
    tail = _expanded_tail(0.025, units, degrees)
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)


def _inverted(samples: Floats, *, units: int, degrees: int) -> float:
    """Two-sided p of zero: twice the tail whose expanded percentile interval of the samples [R] ends at zero."""
    beyond = min(float(np.mean(samples <= 0)), float(np.mean(samples >= 0)))
    beyond = max(beyond, 1 / (len(samples) + 1))
    if beyond >= 0.5:
        return 1.0
    low, high = 0.0, 0.5
    for _ in range(50):  # bisection: the expanded tail grows with the tail
        middle = (low + high) / 2
        low, high = (middle, high) if _expanded_tail(middle, units, degrees) < beyond else (low, middle)
    return 2 * high


def _expanded_tail(tail: float, units: int, degrees: int) -> float:
    """The quantile to read so that n units leave `tail` on a side: Phi(-sqrt(n/degrees) t), t Student's 1 - tail quantile.

    Student's quantile by its expansion in 1/degrees (Abramowitz and Stegun 26.7.5), good to 1 % from 4 degrees on.
    """
    if tail <= 0:
        return 0.0
    z = -_NORMAL.inv_cdf(tail)
    student = (
        z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )  # fmt: skip
    return 0.5 * math.erfc(math.sqrt(units / degrees) * student / math.sqrt(2))
