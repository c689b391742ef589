"""Two records of the same documents: the interval of the paired difference; without documents there is no verdict."""

import math
import random
from pathlib import Path
from statistics import NormalDist, mean, stdev

import pytest

from quantlab.evaluation.measured import Measured
from quantlab.evaluation.quality.metrics import Documents
from quantlab.evaluation.record import Record, read_record
from quantlab.report.comparison.compare import UNPAIRED, Number, compare
from quantlab.report.comparison.paired import paired
from quantlab.report.leaderboard.leaderboard import build_leaderboard
from quantlab.report.matrix.matrix import build_matrix
from quantlab.report.matrix.recommend import recommend
from quantlab.report.matrix.rows import metric
from tests.report.conftest import make_memory, make_quality, make_record, make_speed, make_task, measured

ROOT = Path(__file__).parents[2]
COUNT = 40


def documents(offsets: list[float], *, sha: str = "t", tokens: int = 100) -> Documents:
    """Documents of two kinds and equal length; the baseline's losses vary much more than the offsets."""
    base = [tokens * (3 + index % 7) for index in range(len(offsets))]
    right = [50 + index % 5 for index in range(len(offsets))]
    return Documents(
        tokens_sha256=sha,
        domain=tuple(("prose", "code")[index % 2] for index in range(len(offsets))),
        tokens=(tokens,) * len(offsets),
        nll=tuple(cost + tokens * offset for cost, offset in zip(base, offsets, strict=True)),
        correct=tuple(right),
        kl=tuple(tokens * abs(offset) for offset in offsets),
        kl_tokens=(tokens,) * len(offsets),
        agreeing=tuple(right),
        to_wrong=(0,) * len(offsets),
        to_right=(0,) * len(offsets),
        baseline_nll=tuple(float(cost) for cost in base),
        baseline_correct=tuple(right),
    )


def row(variant: str, found: Documents | None, *, description: str = "int4_g128 (gptq)", rise: float = 1.5) -> Record:
    kl = sum(found.kl) / sum(found.tokens) if found else 0.02
    quality = make_quality(loss=measured(0.5, 0.4), rise=measured(rise, 0.9), kl=kl)
    return make_record(
        variant,
        quality=quality.model_copy(update={"documents": found}),
        memory=make_memory(34.9),
        speed=make_speed(2.0),
        description=description,
    )


def numbers(a: Record, b: Record) -> dict[str, Number]:
    (pair,) = compare([(Path("a"), a)], [(Path("b"), b)], names=("a", "b")).pairs
    return {number.key: number for number in pair.numbers}


def test_the_interval_is_that_of_an_obvious_bootstrap() -> None:
    """Oracle: documents drawn one by one per kind of text, both sides summed over the same draws; tails widened for 38 degrees."""
    generator = random.Random(1)
    a, b = ([abs(generator.gauss(0.1, 0.02)) for _ in range(COUNT)] for _ in range(2))
    one, other = documents(a), documents(b)
    drawn = []
    for _ in range(6000):
        chosen = [2 * generator.randrange(COUNT // 2) + kind for kind in (0, 1) for _ in range(COUNT // 2)]
        perplexities = [
            math.exp(sum(side.nll[index] for index in chosen) / sum(side.tokens[index] for index in chosen))
            for side in (one, other)
        ]
        drawn.append(perplexities[1] - perplexities[0])
    tail = NormalDist().cdf(-2.0244 * math.sqrt(40 / 38))  # Student's 97.5 % quantile for 38 degrees
    low, high = (sorted(drawn)[round(share * len(drawn))] for share in (tail, 1 - tail))
    found = paired(one, other, metric("perplexity"))
    assert found is not None
    everything = [math.exp(sum(side.nll) / sum(side.tokens)) for side in (one, other)]
    assert (found.value, found.n) == (pytest.approx(everything[1] - everything[0], rel=1e-12), 4000)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * (high - low))


def test_the_interval_of_a_mean_is_about_that_of_the_textbook() -> None:
    """One kind of text: mean of 12 differences with Student's 97.5 % quantile for 11 degrees, 2.200985."""
    generator = random.Random(1)
    a, b = ([abs(generator.gauss(0.1, 0.02)) for _ in range(12)] for _ in range(2))
    one, other = (documents(side).model_copy(update={"domain": ("prose",) * 12}) for side in (a, b))
    found = paired(one, other, metric("kl_to_baseline"))
    assert found is not None
    gaps = [y - x for x, y in zip(a, b, strict=True)]
    half = 2.200985 * stdev(gaps) / 12**0.5
    assert (found.value, found.n) == (pytest.approx(mean(gaps)), 1200)
    assert (found.low, found.high) == pytest.approx((mean(gaps) - half, mean(gaps) + half), abs=0.2 * half)


def test_a_loss_against_the_baseline_has_the_interval_that_its_record_has() -> None:
    """In the kept records, every number that is a function of sums is recomputed with its interval.

    The matrix shows the record's interval, comparisons and claims that of `paired`; both must use the same method.
    """
    read = 0
    for path in sorted((ROOT / "eval" / "results").glob("*/records/*.json")):
        quality = read_record(path).quality
        assert quality is not None
        assert quality.documents is not None
        zero = quality.documents.model_copy(
            update={"nll": quality.documents.baseline_nll, "correct": quality.documents.baseline_correct}
        )
        for name in ("perplexity_change_percent", "accuracy_loss_percent", "accuracy_loss"):
            held, found = getattr(quality, name), paired(zero, quality.documents, metric(name))
            if held is not None and found is not None:
                read += 1
                ends = [(one.value, one.low, one.high) for one in (held, found)]
                assert ends[0] == pytest.approx(ends[1], rel=1e-9, abs=1e-9), (path, name)
    assert read >= 40


@pytest.mark.slow
def test_intervals_cover_the_truth() -> None:
    """1,000 simulated pairs without a true difference: coverage for the change of perplexity is between 93 and 97 %."""
    generator, hits = random.Random(2), 0
    for _ in range(1000):
        a = [generator.gauss(0.02, 0.02) for _ in range(COUNT)]
        b = [value + generator.gauss(0.0, 0.01) for value in a]
        found = paired(documents(a), documents(b), metric("perplexity_change_percent"))
        assert found is not None
        hits += found.low <= 0 <= found.high
    assert 930 <= hits <= 970


def test_a_difference_that_each_interval_hides_is_found_when_paired() -> None:
    a = [0.02 * (index % 3) for index in range(COUNT)]
    first, second = row("a", documents(a)), row("b", documents([value + 0.002 for value in a]))
    found = numbers(first, second)
    assert found["perplexity_change_percent"].paired
    assert found["perplexity_change_percent"].verdict == "A is better"
    assert found["perplexity"].verdict == "A is better"
    assert found["kl_to_baseline"].verdict == "A is better"
    assert found["accuracy_loss_percent"].verdict == "equal"
    same = numbers(first, row("b", documents(a)))
    assert {same[key].verdict for key in ("perplexity", "perplexity_change_percent", "kl_to_baseline")} == {"equal"}


@pytest.mark.parametrize("other", [None, documents([0.0] * COUNT, sha="other"), documents([0.0] * COUNT, tokens=99)])
def test_without_the_same_documents_nothing_is_claimed(other: Documents | None) -> None:
    found = numbers(row("a", documents([0.1] * COUNT)), row("b", other, rise=9.0))["perplexity_change_percent"]
    assert (found.verdict, found.reason, found.paired) == ("not judged", UNPAIRED, False)
    assert found.difference is not None
    assert found.difference.low > 0


def test_tasks_are_paired_item_by_item() -> None:
    scores = tuple(float(index % 2) for index in range(100))
    better = tuple(1.0 if index < 12 else score for index, score in enumerate(scores))
    gaps = [y - x for x, y in zip(scores, better, strict=True)]

    def answered(variant: str, scored: tuple[float, ...], *, kept: bool = True) -> Record:
        items = {"document_items": (1,) * 100, "document_scores": scored} if kept else {}
        task = make_task("quiz", mean(scored), 0.5 - mean(scored) + 0.1).model_copy(update=items)
        return row(variant, None).model_copy(update={"tasks": (task,)})

    found = numbers(answered("a", scores), answered("b", better))
    assert found["task_score.quiz"].verdict == found["task_loss.quiz"].verdict == "B is better"
    difference = found["task_score.quiz"].difference
    assert difference is not None
    half = 1.9842 * stdev(gaps) / 10  # Student's quantile for 99 degrees
    assert difference.value == pytest.approx(0.06)
    assert difference.high - difference.low == pytest.approx(2 * half, rel=0.1)
    unpaired = numbers(answered("a", scores), answered("b", better, kept=False))["task_loss.quiz"]
    assert (unpaired.verdict, unpaired.reason) == ("not judged", UNPAIRED)


def test_equal_rows_recommend_the_one_with_fewer_passes(recipe: list[Record]) -> None:
    generator = random.Random(3)
    plain = [0.015 + generator.gauss(0, 0.01) for _ in range(COUNT)]
    luckier = [value - 0.001 + generator.gauss(0, 0.01) for value in plain]
    surely = [value - 0.005 for value in plain]
    description = "prune 0.08 (sparsegpt) → int4_g128 (gptq)"

    def picks(other: list[float], *, paired_rows: bool = True) -> list[tuple[str | None, str]]:
        simple = row("w4a16", documents(plain) if paired_rows else None)
        more = row("pruned-8-w4a16", documents(other) if paired_rows else None, description=description, rise=1.4)
        return [(found.variant, found.sentence) for found in recommend(build_matrix([recipe[0], simple, more]))[1:]]

    for variant, sentence in picks(luckier):
        assert variant == "w4a16"
        assert "pruned-8-w4a16 has the same layout and 2 passes in place of 1, and no measurable difference" in sentence
        assert "on the same documents" in sentence
    for variant, sentence in picks(luckier, paired_rows=False):
        assert variant == "w4a16"
        assert "(unpaired)" in sentence
    assert {variant for variant, _ in picks(surely)} == {"pruned-8-w4a16"}


def test_ranks_are_paired(recipe: list[Record]) -> None:
    kl = [0.02 * (1 + index % 3) for index in range(COUNT)]
    rows = [row("a", documents(kl)), row("b", documents([value + 0.001 for value in kl])), row("same", documents(kl))]
    board = build_leaderboard([("run", [(record.variant, record) for record in (recipe[0], *rows)])])
    assert {place.row.variant: place.rank for place in board.places} == {"a": "1–2", "same": "1–2", "b": "3"}


def test_documents_stay_in_the_records(recipe: list[Record]) -> None:
    matrix = build_matrix([recipe[0], row("a", documents([0.1] * COUNT))])
    assert matrix.rows[1].documents is not None
    assert "documents" not in matrix.to_json()


def test_too_few_documents_have_no_interval() -> None:
    few, enough = documents([0.1] * 20), documents([0.1] * 22)  # every other of them prose
    assert paired(few, few, metric("perplexity"), domain="prose") is None
    assert isinstance(paired(enough, enough, metric("perplexity"), domain="prose"), Measured)
