"""Intervals have their nominal coverage on simulated data with known truth."""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest

from quantlab.evaluation.measured import Measured
from quantlab.evaluation.statistics import (
    RESAMPLES,
    holm,
    mcnemar,
    median,
    over_processes,
    percentile,
    process_variation,
    resample,
)

EXPERIMENTS = 2000


def covered(measure: Callable[[np.random.Generator], Measured], truth: float) -> float:
    """Share of simulated experiments whose interval contains the truth."""
    generator = np.random.default_rng(7)
    found = [measure(generator) for _ in range(EXPERIMENTS)]
    return float(np.mean([one.low <= truth <= one.high for one in found]))


@pytest.mark.slow
@pytest.mark.parametrize("documents", [12, 20, 40, 120])
def test_ninety_five_percent_intervals_of_a_perplexity_cover_the_truth(documents: int) -> None:
    # documents of unequal length whose difficulty varies, in two domains
    strata = np.arange(documents) % 2
    mean = np.where(strata == 0, 2.0, 4.0)

    def experiment(generator: np.random.Generator) -> Measured:
        tokens = generator.integers(200, 600, documents).astype(float)
        nll = tokens * (mean + generator.normal(0, 0.5, documents))
        sums = resample(np.stack([tokens, nll], axis=1), strata)
        return sums.measure(lambda row: np.exp(row[..., 1] / row[..., 0]), n=1)

    assert 0.93 <= covered(experiment, float(np.exp(3.0))) <= 0.97


@pytest.mark.slow
def test_intervals_of_a_mean_kl_cover_the_truth() -> None:
    documents = 120
    strata = np.arange(documents) % 4

    def experiment(generator: np.random.Generator) -> Measured:
        tokens = generator.integers(100, 250, documents).astype(float)
        kl = tokens * generator.lognormal(-4, 0.4, documents)  # skewed: some documents are far worse than others
        sums = resample(np.stack([tokens, kl], axis=1), strata)
        return sums.measure(lambda row: row[..., 1] / row[..., 0], n=1)

    assert 0.93 <= covered(experiment, float(np.exp(-4 + 0.4**2 / 2))) <= 0.97


def correct_of_two(generator: np.random.Generator, documents: int, loss: float) -> np.ndarray:
    """Sums of tokens, correct ones of the baseline and correct ones of an artifact with a given loss, per document [D, 3]."""
    tokens = generator.integers(100, 250, documents)
    easy = np.clip(generator.normal(0.4, 0.1, documents), 0.05, 0.95)
    flips = 0.02 * np.exp(generator.normal(0, 0.3, documents))
    baseline = generator.binomial(tokens, easy)
    lost = generator.binomial(baseline, np.clip(flips / easy + loss, 0, 1))
    won = generator.binomial(tokens - baseline, flips / (1 - easy))
    return np.stack([tokens, baseline, baseline - lost + won], axis=1).astype(float)


def accuracy_loss(row: np.ndarray) -> np.ndarray:
    return 100 * (row[..., 1] - row[..., 2]) / row[..., 1]


@pytest.mark.slow
def test_intervals_of_a_paired_accuracy_loss_cover_the_truth() -> None:
    strata = np.arange(120) % 4

    def experiment(generator: np.random.Generator) -> Measured:
        return resample(correct_of_two(generator, 120, 0.01), strata).measure(accuracy_loss, n=1)

    assert 0.93 <= covered(experiment, 1.0) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("share", "documents", "tokens"), [(0.5, 40, 10), (0.99, 60, 50)])
def test_intervals_of_a_percentile_of_tokens_cover_the_truth(share: float, documents: int, tokens: int) -> None:
    index, strata = np.repeat(np.arange(documents), tokens), np.arange(documents) % 2
    spread = np.hypot(1.0, 0.3)

    def experiment(generator: np.random.Generator) -> Measured:
        kl = generator.lognormal(0, 1.0, documents * tokens) * generator.lognormal(0, 0.3, documents)[index]
        return percentile(kl, index, strata, share=share)

    assert 0.93 <= covered(experiment, float(np.exp(spread * NormalDist().inv_cdf(share)))) <= 0.97


def test_a_percentile_is_that_of_every_draws_tokens() -> None:
    generator = np.random.default_rng(5)
    sizes = generator.integers(20, 60, 12)
    index, strata = np.repeat(np.arange(12), sizes), np.zeros(12, dtype=np.int64)
    values = generator.lognormal(0, 1, len(index)) * generator.lognormal(0, 1, 12)[index]
    drawn = []
    for _ in range(RESAMPLES):
        chosen = generator.integers(0, 12, 12)
        drawn.append(np.quantile(np.concatenate([values[index == one] for one in chosen]), 0.9, method="inverted_cdf"))
    measured = percentile(values, index, strata, share=0.9)
    assert measured.value == np.quantile(values, 0.9, method="inverted_cdf")
    # the quantiles that twelve documents' 95 % interval reads
    low, high = np.quantile(drawn, [0.0108, 1 - 0.0108])
    assert measured.low == pytest.approx(low, rel=0.15)
    assert measured.high == pytest.approx(high, rel=0.15)


def test_a_row_that_loses_nothing_is_called_a_loss_one_time_in_twenty_at_most() -> None:
    """Checks the rate over all rows of a matrix with Holm, and of single rows by interval and by p, which must agree."""
    generator, strata = np.random.default_rng(11), np.arange(120) % 4
    rows, matrices = 5, EXPERIMENTS // 5
    found = [
        [resample(correct_of_two(generator, 120, 0.0), strata).compare(accuracy_loss, n=1) for _ in range(rows)]
        for _ in range(matrices)
    ]
    alone = [one.p < 0.05 for matrix in found for _, one in matrix]
    excluded = [one.verdict != "no measurable loss" for matrix in found for _, one in matrix]
    assert 0.03 <= np.mean(alone) <= 0.06
    assert np.mean(np.array(alone) != np.array(excluded)) <= 0.002
    any_row = [min(holm([one.p for _, one in matrix])) <= 0.05 for matrix in found]
    assert 0.02 <= np.mean(any_row) <= 0.07


def test_a_row_that_loses_something_is_found() -> None:
    generator, strata = np.random.default_rng(12), np.arange(120) % 4
    found = [resample(correct_of_two(generator, 120, 0.03), strata).compare(accuracy_loss, n=1)[1] for _ in range(200)]
    assert np.mean([one.verdict == "loss" for one in found]) > 0.9
    gained = resample(correct_of_two(generator, 120, 0.05)[:, [0, 2, 1]], strata).compare(accuracy_loss, n=1)[1]
    assert gained.verdict == "gain"
    same = np.tile([[100.0, 40.0, 40.0]], (12, 1))
    _, nothing = resample(same, np.zeros(12, dtype=np.int64)).compare(accuracy_loss, n=1)
    assert (nothing.p, nothing.verdict) == (1.0, "no measurable loss")


def test_mcnemars_p_is_that_of_a_fair_coin() -> None:
    for wrong, right in ((0, 0), (3, 3), (1, 9), (9, 1), (30, 12)):
        flips = wrong + right
        heads = [math.comb(flips, k) / 2**flips for k in range(flips + 1)]
        expected = min(1.0, 2 * sum(heads[: min(wrong, right) + 1]))
        assert mcnemar(wrong, right) == pytest.approx(expected)
    generator = np.random.default_rng(13)
    flips = generator.poisson(25, EXPERIMENTS)
    to_wrong = generator.binomial(flips, 0.5)
    alarms = np.mean([mcnemar(int(w), int(n - w)) <= 0.05 for w, n in zip(to_wrong, flips, strict=True)])
    assert 0.01 <= alarms <= 0.05
    assert mcnemar(40, 10) < 0.001


def test_holms_p_values_are_those_of_stepping_down() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@pytest.mark.parametrize("repetitions", [6, 7, 9, 14, 15, 31])
@pytest.mark.parametrize("noise", ["lognormal", "gumbel"])
def test_ninety_five_percent_intervals_of_a_median_cover_the_truth(repetitions: int, noise: str) -> None:
    def experiment(generator: np.random.Generator) -> Measured:
        if noise == "lognormal":
            return median(generator.lognormal(0, 0.3, repetitions))
        return median(
            generator.gumbel(1 + math.log(math.log(2)), 1, repetitions)
        )  # some rounds are slowed down, none sped up

    assert 0.93 <= covered(experiment, 1.0) <= 0.97
    assert experiment(np.random.default_rng(0)).interval == "95 %"


def test_with_six_repetitions_the_interval_is_just_inside_their_range() -> None:
    # the range of six covers the median with 31/32, the inner four with 25/32: equation 4 goes 5/14 of the way between
    measured = median(np.array([1.0, 2, 4, 6, 8, 9]))
    assert (measured.low, measured.high) == pytest.approx((1 + 5 / 14, 9 - 5 / 14))


@pytest.mark.parametrize("documents", [5, 8, 10])
def test_too_few_documents_give_a_range_and_no_verdict(documents: int) -> None:
    generator = np.random.default_rng(2)
    shares = generator.uniform(0.1, 0.2, documents)
    table, strata = np.stack([np.full(documents, 100.0), 100 * shares], axis=1), np.zeros(documents, dtype=np.int64)
    measured, significance = resample(table, strata).compare(lambda row: row[..., 1] / row[..., 0], n=7)
    assert (measured.value, measured.low, measured.high) == pytest.approx((shares.mean(), shares.min(), shares.max()))
    assert (measured.interval, measured.reason, measured.n) == ("range", f"{documents} documents", 7)
    assert significance is None
    tokens = percentile(np.repeat(shares, 10), np.repeat(np.arange(documents), 10), strata, share=0.5)
    assert (tokens.interval, tokens.reason) == ("range", f"{documents} documents")
    assert (tokens.low, tokens.high) == (shares.min(), shares.max())


UNEQUAL = np.array([0.5, 0.6, 0.7, 0.8, 0.8, 2.0])[:, None, None]
"""Relative variation between processes of FP16 and five layouts, as observed for the suite `quick`."""
BATCHES = 4


def evaluated(generator: np.random.Generator, processes: int, *, between_processes: float) -> list[Measured]:
    """Simulated ratios of one evaluation with truth 2. Each process has random effects on every twin and batch size, including
    FP16, and each round has a random clock.
    """
    rounds = 5
    values = np.zeros((len(UNEQUAL) - 1, BATCHES, processes, rounds))
    for process in range(processes):
        effects = generator.normal(0, between_processes, (len(UNEQUAL), BATCHES, 1)) * UNEQUAL
        clock = generator.normal(0, 0.1, (1, 1, rounds))
        times = np.exp(effects + clock + generator.normal(0, 0.02, (len(UNEQUAL), BATCHES, rounds)))
        values[:, :, process] = 2 * times[1:] / times[:1]
    spreads = [process_variation(np.median(values[:, batch], axis=2), independent=2) for batch in range(BATCHES)]
    return [over_processes(list(cell), spread) for twin in values for cell, spread in zip(twin, spreads, strict=True)]


@pytest.mark.parametrize("processes", [3, 4])
@pytest.mark.parametrize("between_processes", [0.0, 0.03, 0.1])
def test_two_evaluations_give_speed_ratios_within_each_others_intervals(
    processes: int, between_processes: float
) -> None:
    generator = np.random.default_rng(8)
    inside = []
    for _ in range(EXPERIMENTS // 10):  # of twenty cells each
        one, other = (evaluated(generator, processes, between_processes=between_processes) for _ in range(2))
        inside += [a.low <= b.value <= a.high for a, b in zip(one, other, strict=True)]
    # where processes do not differ the least and the most of all medians hold more
    assert 0.93 <= np.mean(inside) <= (0.97 if between_processes else 1)


def test_two_processes_give_a_range() -> None:
    told = evaluated(np.random.default_rng(1), 2, between_processes=0.03)[0]
    assert (told.interval, told.reason) == ("range", "2 processes")


def test_rounds_of_one_process_alone_would_promise_too_much() -> None:
    """The interval of the median over rounds ignores processes, and misses the next evaluation most of the time."""
    generator = np.random.default_rng(9)
    inside = []
    for _ in range(EXPERIMENTS):
        first, second = generator.normal(0, 0.05, 2)
        one = median(np.exp(first + generator.normal(0, 0.02, 10)))
        inside.append(one.low <= np.exp(second) <= one.high)
    assert np.mean(inside) < 0.5


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


@pytest.mark.parametrize(("repetitions", "reason"), [(1, "1 repetition"), (2, "2 repetitions"), (5, "5 repetitions")])
def test_few_timings_are_reported_with_their_range(repetitions: int, reason: str) -> None:
    values = np.arange(1.0, repetitions + 1)
    measured = median(values)
    assert (measured.value, measured.low, measured.high, measured.n) == (values.mean(), 1.0, repetitions, repetitions)
    assert (measured.interval, measured.reason) == ("range", reason)


def test_only_a_range_is_written_with_what_it_is() -> None:
    assert set(Measured(value=1, low=0, high=2, n=9).model_dump()) == {"value", "low", "high", "n"}
    few = median(np.array([1.0, 2.0]))
    assert few.model_dump()["reason"] == "2 repetitions"
    assert Measured.model_validate_json(few.model_dump_json()) == few
