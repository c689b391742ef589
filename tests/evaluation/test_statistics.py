"""Intervals hold what they promise, on data whose truth is known."""

import numpy as np
import pytest

from quantlab.evaluation.statistics import median, resample


@pytest.mark.parametrize("documents", [12, 40, 120])
def test_ninety_five_percent_intervals_of_a_ratio_of_sums_cover_the_truth(documents: int) -> None:
    # documents of unequal length whose difficulty varies, in two domains
    generator = np.random.default_rng(7)
    strata = np.arange(documents) % 2
    mean = np.where(strata == 0, 2.0, 4.0)
    truth = 3.0
    covered, trials = 0, 1000
    for _ in range(trials):
        tokens = generator.integers(200, 600, documents).astype(float)
        nll = tokens * (mean + generator.normal(0, 0.5, documents))
        measured = resample(np.stack([tokens, nll], axis=1), strata).measure(
            lambda sums: sums[..., 1] / sums[..., 0], n=1
        )
        covered += measured.low <= truth <= measured.high
    assert 0.92 <= covered / trials <= 0.98


@pytest.mark.parametrize("rounds", [9, 15, 31])
def test_intervals_of_a_median_cover_the_truth(rounds: int) -> None:
    generator = np.random.default_rng(3)
    trials = 400
    measured = [median(generator.lognormal(0, 0.3, rounds)) for _ in range(trials)]
    assert 0.92 <= np.mean([m.low <= 1 <= m.high for m in measured]) <= 0.99


def test_a_document_is_only_exchanged_with_documents_of_its_domain() -> None:
    table = np.array([[1.0, 5.0]] * 6 + [[1.0, 9.0]] * 6)
    by_domain = resample(table, np.repeat([0, 1], 6)).measure(lambda sums: sums[..., 1] / sums[..., 0], n=1)
    together = resample(table, np.zeros(12, dtype=np.int64)).measure(lambda sums: sums[..., 1] / sums[..., 0], n=1)
    assert (by_domain.low, by_domain.high) == (7.0, 7.0)
    assert together.low < 6.5 < 7.5 < together.high


def test_a_paired_difference_is_far_narrower_than_its_sides() -> None:
    generator = np.random.default_rng(0)
    baseline = generator.normal(100, 30, 60)
    table = np.stack([baseline, baseline + generator.normal(1, 0.1, 60)], axis=1)
    sums = resample(table, np.zeros(60, dtype=np.int64))
    side = sums.measure(lambda row: row[..., 0], n=1)
    difference = sums.measure(lambda row: row[..., 1] - row[..., 0], n=1)
    assert difference.low < 60 < difference.high
    assert difference.high - difference.low < (side.high - side.low) / 50


def test_the_same_data_always_give_the_same_interval() -> None:
    values = np.random.default_rng(1).normal(size=11)
    assert median(values) == median(values.copy())
    table, strata = values[:, None] + 3, np.zeros(11, dtype=np.int64)
    first, second = (resample(table, strata).measure(lambda sums: sums[..., 0], n=11) for _ in range(2))
    assert first == second


def test_few_timings_are_reported_with_their_range() -> None:
    measured = median(np.array([2.0, 1.0]))
    assert (measured.value, measured.low, measured.high, measured.n) == (1.5, 1.0, 2.0, 2)
