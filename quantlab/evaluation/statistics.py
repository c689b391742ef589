"""Intervals: a bootstrap over documents for numbers on text, order statistics for timings.

**Text.** Tokens of one document are correlated, so the resampled unit is the document: 2,000 draws with replacement, stratified
by domain (the suite fixes the domains' shares). Every number of the quality table is a function of sums over documents. A draw
is therefore a vector of counts, all draws are one matrix product, and differences are paired: both sides are summed over the
same drawn documents. Losses against the baseline, comparisons of two records, ranks and claims all use these intervals.

**Percentiles** over tokens (median and 99th percentile of the KL) are computed from the tokens of the documents of each draw.

**Significance.** p inverts the interval of the same number: it is the largest level at which the interval still covers zero.
Items scored right or wrong have an exact test, McNemar's. Several rows are compared with one baseline, so p is corrected
for their number as in S. Holm, "A simple sequentially rejective multiple test procedure" (1979).

**Timings.** The value is the median, because a busy machine slows single rounds down and never speeds them up. The interval lies
between order statistics and assumes nothing about the noise: T. P. Hettmansperger and S. J. Sheather, "Confidence intervals
based on interpolated order statistics" (Statistics & Probability Letters 4, 1986). With fewer than six repetitions even the full
range covers the median with less than 95 %, so the range is reported and labelled as one.

**Speed** varies more between processes (memory addresses, clock) than between the turns of one process. A cell is timed in few
processes, so the variance between processes is pooled over the timed models. The interval predicts the number that another
evaluation would find.

**Too few units** give no interval: below ten degrees of freedom the simulated coverage of a 95 % interval falls below 93 %. The
range over single documents is reported instead and labelled as one; no conclusion is drawn from it.

Percentile intervals are too narrow for few units: they lack the factor sqrt(n/(n-1)) and Student's tails.
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

from quantlab.evaluation.measured import FEWEST_DEGREES, Measured, Significance, verdict

Floats = NDArray[np.float64]
RESAMPLES = 2000
_SEED = 0
_NORMAL = NormalDist()
_CANDIDATES = 4000
_FEWEST_POOLED = 3
"""Minimum degrees of freedom of an interval from pooled processes."""
FEWEST_REPETITIONS = 6
"""Minimum repetitions for the interval of a median: the range of five covers the median with 93.75 %."""


@dataclass(frozen=True)
class Resampled:
    """Sums over documents, and the same sums over many draws of documents.

    Attributes:
        table: the contribution of each document to each sum [D, C].
        draws: sums over each draw [R, C].
        units: number of documents.
        degrees: degrees of freedom: documents minus strata, because every stratum's mean uses up one.
    """

    table: Floats
    draws: Floats
    units: int
    degrees: int

    @functools.cached_property
    def totals(self) -> Floats:
        """Sums over all documents [C]."""
        total: Floats = self.table.sum(axis=0)
        return total

    def measure(self, statistic: Callable[[Floats], Floats], *, n: int) -> Measured:
        """A number that is a function of sums.

        Args:
            statistic: maps sums [..., C] to values [...].
            n: the count to report.
        """
        value = float(statistic(self.totals))
        if self.degrees < FEWEST_DEGREES:
            with np.errstate(divide="ignore", invalid="ignore"):  # the denominator of a document may be zero
                return _range(value, statistic(self.table), n=n, reason=f"{self.units} documents")
        low, high = _percentile_interval(statistic(self.draws), units=self.units, degrees=self.degrees)
        return Measured(value=value, low=low, high=high, n=n)

    def compare(self, statistic: Callable[[Floats], Floats], *, n: int) -> tuple[Measured, Significance | None]:
        """A difference to the baseline that is a function of sums, positive where the artifact is worse.

        The significance is None if there are too few documents for an interval.
        """
        measured = self.measure(statistic, n=n)
        if measured.interval != "95 %":
            return measured, None
        p = _inverted(statistic(self.draws), units=self.units, degrees=self.degrees)
        return measured, Significance(p=p, verdict=verdict(measured))


def resample(table: Floats, strata: NDArray[np.int64]) -> Resampled:
    """Draw rows of `table` with replacement; every draw has as many rows of each stratum as the table.

    Args:
        table: the contribution of each document to each sum [D, C].
        strata: the stratum (domain) of each document [D].
    """
    present = np.unique(strata)
    by_stratum = [table[strata == stratum] for stratum in present]
    draws = sum((_counts(len(rows), index) @ rows for index, rows in enumerate(by_stratum)), np.zeros(1))
    return Resampled(table, draws, units=len(table), degrees=len(table) - len(present))


@functools.lru_cache(maxsize=64)
def _counts(units: int, stratum: int) -> Floats:
    """Multiplicity of each of `units` units in each draw [R, units]; identical for every artifact."""
    generator = np.random.default_rng((_SEED, stratum))
    return generator.multinomial(units, np.full(units, 1 / units), size=RESAMPLES).astype(np.float64)


def percentile(values: Floats, documents: NDArray[np.int64], strata: NDArray[np.int64], *, share: float) -> Measured:
    """A percentile over tokens, with its interval over documents.

    Args:
        values: one per token [T].
        documents: the document of each token, as an index into `strata` [T].
        strata: the stratum (domain) of each document [D]; documents without tokens are ignored.
        share: the percentile as a share, at least 0.5 (the median).
    """
    order = np.argsort(values, kind="stable")
    # candidates: the upper values, three times as many as lie above the percentile; draws move it by much less
    least = max(int(len(values) * (1 - 3 * (1 - share))), 0)
    ranks = np.unique(np.linspace(least, len(values) - 1, _CANDIDATES).astype(np.int64))
    above = np.zeros((len(ranks) + 1, len(strata)))
    np.add.at(above, (np.searchsorted(ranks, np.arange(len(values))), documents[order]), 1.0)
    above = above[:0:-1].cumsum(axis=0)[::-1]  # tokens of each document above each candidate [C, D]
    tokens = np.bincount(documents, minlength=len(strata))
    counts, degrees = _drawn_documents(strata, tokens > 0)
    allowed = (1 - share) * (counts @ tokens)
    first, last = np.zeros(RESAMPLES, dtype=np.int64), np.full(RESAMPLES, len(ranks) - 1)
    while (first < last).any():  # bisection for all draws at once: the first candidate with few enough tokens above it
        middle = (first + last) // 2
        enough = np.einsum("rd,rd->r", counts, above[middle]) <= allowed
        first, last = np.where(enough, first, middle + 1), np.where(enough, middle, last)
    samples = values[order][ranks][first]
    units = int((tokens > 0).sum())
    value = float(values[order][math.ceil(share * len(values)) - 1])
    if degrees < FEWEST_DEGREES:
        singly = [np.quantile(values[documents == one], share) for one in np.flatnonzero(tokens)]
        return _range(value, np.array(singly), n=len(values), reason=f"{units} documents")
    low, high = _percentile_interval(samples, units=units, degrees=degrees)
    return Measured(value=value, low=low, high=high, n=len(values))


def _drawn_documents(strata: NDArray[np.int64], seen: NDArray[np.bool_]) -> tuple[Floats, int]:
    """Multiplicity of each document in each draw of `resample` [R, D], and the degrees of freedom."""
    counts = np.zeros((RESAMPLES, len(strata)))
    present = np.unique(strata[seen])
    for index, stratum in enumerate(present):
        rows = np.flatnonzero(seen & (strata == stratum))
        counts[:, rows] = _counts(len(rows), index)
    return counts, int(seen.sum()) - len(present)


def mcnemar(to_wrong: int, to_right: int) -> float:
    """Two-sided exact p of McNemar's test: the probability that a fair coin splits the changed items at least as unevenly.

    Args:
        to_wrong: items that changed from right to wrong.
        to_right: items that changed from wrong to right.
    """
    flips, fewer = to_wrong + to_right, min(to_wrong, to_right)
    logs = [math.lgamma(flips + 1) - math.lgamma(k + 1) - math.lgamma(flips - k + 1) for k in range(fewer + 1)]
    tail = math.fsum(math.exp(log - flips * math.log(2)) for log in logs)
    return min(1.0, 2 * tail)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order of `values`: reject if the adjusted p is at most the level."""
    adjusted, largest = [0.0] * len(values), 0.0
    for step, index in enumerate(sorted(range(len(values)), key=lambda index: values[index])):
        largest = max(largest, min(1.0, (len(values) - step) * values[index]))
        adjusted[index] = largest
    return adjusted


def median(values: Floats) -> Measured:
    """The median of repetitions [n] with its interval between order statistics; with their range if there are fewer than six.

    With x sorted, x_k to x_(n+1-k) covers the median with probability 1 - 2 P(B < k), B binomial(n, 1/2). Both ends are
    interpolated between the largest k that still covers it with 95 % and k + 1 (Hettmansperger and Sheather 1986, equation 4).
    """
    x, n = np.sort(values), len(values)
    middle = float(np.median(x))
    if n < FEWEST_REPETITIONS:
        return _range(middle, x, n=n, reason=f"{n} repetition{'s' if n > 1 else ''}")
    missed = np.cumsum([math.comb(n, heads) for heads in range(n // 2)]) / 2.0 ** (n - 1)  # by k = 1, 2 …
    k = int(np.flatnonzero(missed <= 0.05)[-1]) + 1
    share = (0.05 - missed[k - 1]) / (missed[k] - missed[k - 1])
    weight = (n - k) * share / (k + (n - 2 * k) * share)
    low = (1 - weight) * x[k - 1] + weight * x[k]
    high = (1 - weight) * x[n - k] + weight * x[n - k - 1]
    return Measured(value=middle, low=float(low), high=float(high), n=n)


@dataclass(frozen=True)
class ProcessVariation:
    """Variation of a timing's median between processes.

    Attributes:
        deviation: standard deviation of the logarithm of the median.
        degrees: degrees of freedom of this estimate.
    """

    deviation: float
    degrees: float


def process_variation(medians: Floats, *, independent: float) -> ProcessVariation:
    """Variance between processes, pooled over the timed models: three processes of one model are too few to estimate it.

    Args:
        medians: median of every model and process [M, P], P at least 2.
        independent: effective number of independent models; their differences between processes are correlated.
    """
    variance = float(np.log(medians).var(axis=1, ddof=1).mean())
    return ProcessVariation(math.sqrt(variance), independent * (medians.shape[1] - 1))


def over_processes(processes: Sequence[Floats], spread: ProcessVariation) -> Measured:
    """A timing repeated in P processes, with the interval that contains the result of P further processes 19 times in 20.

    Args:
        processes: its values in each process [P][n]; the number is the geometric mean of the medians.
        spread: the variation between processes.
    """
    medians = np.array([float(np.median(values)) for values in processes])
    value = float(np.exp(np.log(medians).mean()))
    n = sum(map(len, processes))
    if spread.degrees < _FEWEST_POOLED:
        return _range(value, medians, n=n, reason=f"{len(medians)} processes")
    width = math.exp(_student(0.025, spread.degrees) * spread.deviation * math.sqrt(2 / len(medians)))
    low, high = min(value / width, medians.min()), max(value * width, medians.max())
    return Measured(value=value, low=float(low), high=float(high), n=n)


def _range(value: float, found: Floats, *, n: int, reason: str) -> Measured:
    """A number with the range of its values, used when there are too few for an interval."""
    finite = found[np.isfinite(found)]
    ends = [value, *finite.tolist()]
    return Measured(value=value, low=min(ends), high=max(ends), n=n, interval="range", reason=reason)


def _percentile_interval(samples: Floats, *, units: int, degrees: int) -> tuple[float, float]:
    """The expanded 95 % percentile interval of bootstrap samples [R]."""
    tail = _expanded_tail(0.025, units, degrees)
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)


def _inverted(samples: Floats, *, units: int, degrees: int) -> float:
    """Two-sided p of zero: twice the tail at which the expanded percentile interval of the samples [R] ends at zero."""
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
    """The widened tail of an expanded percentile interval: Phi(-sqrt(units/degrees) t), t Student's 1 - tail quantile."""
    if tail <= 0:
        return 0.0
    return 0.5 * math.erfc(math.sqrt(units / degrees) * _student(tail, degrees) / math.sqrt(2))


def _student(tail: float, degrees: float) -> float:
    """Student's 1 - tail quantile by its expansion in 1/degrees (Abramowitz and Stegun 26.7.5), accurate to 1 % from 3 degrees."""
    z = -_NORMAL.inv_cdf(tail)
    return (
        z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )  # fmt: skip
