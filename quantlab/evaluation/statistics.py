"""Intervals: of numbers over text by resampling documents, of timings by order statistics.

**Text.** Tokens of one document are alike, so the unit that is drawn is the document: 2,000 times, as many documents as
there are, with replacement, domain by domain (the domains' shares are the suite's choice, not chance). Every number of
the quality table is a function of sums over documents, so a draw is a vector of counts, all draws are one matrix product
and a difference is paired by construction: both sides are summed over the same drawn documents. Losses against the baseline,
comparisons of two records, ranks and claims all take their intervals from here.

**Percentiles** of tokens (the median KL, its 99th) are taken of the tokens of each draw, again document by document.

**Significance.** p inverts the interval beside it: the largest level at which the interval still covers zero. Items that are
right or wrong have an exact test of their own, McNemar's. Several rows are held against one baseline, so p is corrected
for their number as in S. Holm, "A simple sequentially rejective multiple test procedure" (1979).

**Timings.** The value is the median, because a busy machine makes single rounds slow, never fast. Its interval lies between order
statistics, which no assumption about the noise enters: T. P. Hettmansperger and S. J. Sheather, "Confidence intervals based on
interpolated order statistics" (Statistics & Probability Letters 4, 1986). Of fewer than six repetitions even the range covers
the median with less than 95 %, so the range is given, under that name.

**Speed** differs between processes (addresses of memory, clock) by more than between the turns of one process. A cell is timed in
few processes, so the variance between them is pooled over the twins, and the interval is that of another evaluation's number.

**Too few units** have no interval at all: below ten degrees of freedom the simulated coverage of a 95 % interval sinks under
93 %. The range over single documents is given instead, under that name, and nothing is concluded from it.

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

from quantlab.evaluation.measured import FEWEST_DEGREES, Measured, Significance, verdict

Floats = NDArray[np.float64]
RESAMPLES = 2000
_SEED = 0
_NORMAL = NormalDist()
_CANDIDATES = 4000
_FEWEST_POOLED = 3
"""Degrees of freedom that an interval from pooled processes takes."""
FEWEST_REPETITIONS = 6
"""Repetitions that an interval of a median takes: the range of five covers it with 93.75 %."""


@dataclass(frozen=True)
class Resampled:
    """Sums over documents, and the same sums over many draws of documents.

    Attributes:
        table: the contribution of each document to each sum [D, C].
        draws: sums over each draw [R, C].
        units: how many documents there are.
        degrees: degrees of freedom: the documents less the strata, because every stratum spends one on its mean.
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
            statistic: takes sums [..., C] to values [...].
            n: the count to report.
        """
        value = float(statistic(self.totals))
        if self.degrees < FEWEST_DEGREES:
            with np.errstate(divide="ignore", invalid="ignore"):  # a document may have nothing to divide by
                return _range(value, statistic(self.table), n=n, reason=f"{self.units} documents")
        low, high = _percentile_interval(statistic(self.draws), units=self.units, degrees=self.degrees)
        return Measured(value=value, low=low, high=high, n=n)

    def compare(self, statistic: Callable[[Floats], Floats], *, n: int) -> tuple[Measured, Significance | None]:
        """A difference to the baseline that is a function of sums, positive where the artifact is worse.

        The significance is None where there are too few documents for an interval.
        """
        measured = self.measure(statistic, n=n)
        if measured.interval != "95 %":
            return measured, None
        p = _inverted(statistic(self.draws), units=self.units, degrees=self.degrees)
        return measured, Significance(p=p, verdict=verdict(measured))


def resample(table: Floats, strata: NDArray[np.int64]) -> Resampled:
    """Draw rows of `table` with replacement, as many of each stratum as there are.

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
    """Multiplicity of each of `units` units in each draw [R, units]; the same for every artifact."""
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
    least = max(int(len(values) * (1 - 3 * (1 - share))), 0)
    ranks = np.unique(np.linspace(least, len(values) - 1, _CANDIDATES).astype(np.int64))
    above = np.zeros((len(ranks) + 1, len(strata)))
    np.add.at(above, (np.searchsorted(ranks, np.arange(len(values))), documents[order]), 1.0)
    above = above[:0:-1].cumsum(axis=0)[::-1]  # tokens of each document above each candidate [C, D]
    tokens = np.bincount(documents, minlength=len(strata))
    counts, degrees = _drawn_documents(strata, tokens > 0)
    allowed = (1 - share) * (counts @ tokens)
    first, last = np.zeros(RESAMPLES, dtype=np.int64), np.full(RESAMPLES, len(ranks) - 1)
    while (first < last).any():  # bisection: the first candidate with few enough tokens above it, of every draw at once
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
    """Two-sided exact p of McNemar's test: the probability that a fair coin splits the changed items at least as unevenly."""
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
    """The median of repetitions [n] with its interval between order statistics; of fewer than six, with their range.

    With x sorted, x_k to x_(n+1-k) covers the median with 1 - 2 P(B < k), B binomial of n coins. ProcessVariation the last k that covers
    it with 95 % and the next one, which does not, both ends are interpolated (Hettmansperger and Sheather 1986, equation 4).
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
    """Variation of the median of a timing between processes.

    Attributes:
        deviation: standard deviation of its logarithm.
        degrees: of freedom that this rests on.
    """

    deviation: float
    degrees: float


def process_variation(medians: Floats, *, independent: float) -> ProcessVariation:
    """Variance between processes, pooled over the twins of one cell: three processes of one twin are too few to estimate it.

    Args:
        medians: of every twin and process [T, P], P at least 2.
        independent: as how many independent numbers the differences of all twins count.
    """
    variance = float(np.log(medians).var(axis=1, ddof=1).mean())
    return ProcessVariation(math.sqrt(variance), independent * (medians.shape[1] - 1))


def over_processes(processes: Sequence[Floats], spread: ProcessVariation) -> Measured:
    """A timing repeated in several processes, with the interval in which as many processes more would find it 19 times in 20.

    Args:
        processes: its values in each process [P][n]; the number is the geometric mean of their medians.
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
    """A number with the range of its values, where there are too few for an interval."""
    finite = found[np.isfinite(found)]
    ends = [value, *finite.tolist()]
    return Measured(value=value, low=min(ends), high=max(ends), n=n, interval="range", reason=reason)


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
    """The quantile to read so that n units leave `tail` on a side: Phi(-sqrt(n/degrees) t), t Student's 1 - tail quantile."""
    if tail <= 0:
        return 0.0
    return 0.5 * math.erfc(math.sqrt(units / degrees) * _student(tail, degrees) / math.sqrt(2))


def _student(tail: float, degrees: float) -> float:
    """Student's 1 - tail quantile by its expansion in 1/degrees (Abramowitz and Stegun 26.7.5), good to 1 % from 3 degrees on."""
    z = -_NORMAL.inv_cdf(tail)
    return (
        z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )  # fmt: skip
