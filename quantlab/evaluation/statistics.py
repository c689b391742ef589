"""Error bars, all by resampling.

**Text.** Tokens of one document are alike, so the unit that is drawn is the document: 2,000 times, as many documents as
there are, with replacement, domain by domain (the domains' shares are the suite's choice, not chance). Every number of
the quality table is a function of sums over documents, so a draw is a vector of counts, all draws are one matrix product
and a difference to the baseline is paired by construction: both sides are summed over the same drawn documents.

**Timings.** The unit is a round, the value the median, because a busy machine makes single rounds slow, never fast.

Percentile intervals come out too narrow when units are few: they leave out the factor sqrt(n/(n-1)) and Student's tails.
The quantiles are widened for both, as in T. Hesterberg, "What Teachers Should Know About the Bootstrap" (2014,
arXiv 1411.5279), "expanded percentile" intervals.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantlab.evaluation.record import Measured

Floats = NDArray[np.float64]
RESAMPLES = 2000
_SEED = 0
_NORMAL_975 = 1.959963984540054


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
    tail = _expanded_tail(units, degrees)
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)


def _expanded_tail(units: int, degrees: int) -> float:
    """The quantile to read so that n units give a 95 % interval: Phi(-sqrt(n/degrees) t), t Student's 97.5 % quantile.

    Student's quantile by its expansion in 1/degrees (Abramowitz and Stegun 26.7.5), good to 1 % from 4 degrees on.
    """
    z = _NORMAL_975
    student = (
        z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )  # fmt: skip
    return 0.5 * math.erfc(math.sqrt(units / degrees) * student / math.sqrt(2))
