"""The difference of two records that scored the same documents: what both err alike on drops out.

Records hold sums over each document. A number of the table is a function of such sums, and so is a difference; its interval
comes from the jackknife: leave out one document after the other, domain by domain, and see how the difference moves (B. Efron
and C. Stein, "The jackknife estimate of variance", Annals of Statistics 1981), with Student's quantile. Of too few documents
nothing is concluded, as in `quantlab.evaluation.statistics`.

Legend: T, N, C … sums over documents by the names of `Documents`.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from quantlab.evaluation.record import FEWEST_DEGREES, Documents, Measured, TaskResult
from quantlab.report.matrix.column import Column

Sums = Mapping[str, float]
Statistic = Callable[[Sums], float]
_SUMS = ("tokens", "nll", "correct", "kl", "agreeing", "to_wrong", "to_right", "baseline_nll", "baseline_correct")


def _per_token(name: str) -> Statistic:
    return lambda sums: sums[name] / sums["tokens"]


STATISTICS: dict[str, Statistic] = {
    "perplexity": lambda sums: math.exp(sums["nll"] / sums["tokens"]),
    "perplexity_change_percent": lambda sums: 100 * math.expm1((sums["nll"] - sums["baseline_nll"]) / sums["tokens"]),
    "accuracy_loss_percent": lambda sums: 100 * (1 - sums["correct"] / sums["baseline_correct"]),
    "next_token_accuracy": _per_token("correct"),
    "kl_to_baseline": _per_token("kl"),
    "top1_agreement": _per_token("agreeing"),
    "divergence.flips_to_wrong": _per_token("to_wrong"),
    "divergence.flips_to_right": _per_token("to_right"),
}
"""Numbers of a record as functions of its sums, by the keys of their columns."""


def paired(a: Documents | None, b: Documents | None, key: str) -> Measured | None:
    """b - a on the same documents, with its 95 % interval.

    Args:
        a, b: sums of two records.
        key: of a column: one of `STATISTICS`, or one of them on a kind of text ("kl_to_baseline_on.prose").

    Returns:
        None where the records hold no sums or too few of them, scored other tokens, or the number is no function of sums.
    """
    name, _, domain = key.partition("_on.")
    statistic = STATISTICS.get(name)
    if a is None or b is None or statistic is None or (a.tokens_sha256, a.tokens) != (b.tokens_sha256, b.tokens):
        return None
    rows = [index for index, found in enumerate(a.domain) if found == domain or not domain]
    strata = [a.domain[index] for index in rows]
    try:
        return _jackknife(
            [[_of_document(side, index) for index in rows] for side in (a, b)],
            strata,
            statistic,
            n=sum(a.tokens[index] for index in rows),
        )
    except (KeyError, ZeroDivisionError, OverflowError):  # a baseline has no sums against itself, or is never right
        return None


def paired_tasks(a: TaskResult, b: TaskResult, column: Column) -> Measured | None:
    """The same of the score or loss of one task."""
    if not a.document_items or a.document_items != b.document_items:
        return None
    sides = [
        [
            {"items": items, "score": score}
            for items, score in zip(task.document_items, task.document_scores, strict=True)
        ]
        for task in (a, b)
    ]
    sign = -1.0 if column.relative and a.higher_is_better else 1.0
    return _jackknife(sides, [""] * len(a.document_items), lambda sums: sign * sums["score"] / sums["items"], n=a.n)


def _of_document(found: Documents, index: int) -> dict[str, float]:
    return {name: values[index] for name in _SUMS if (values := getattr(found, name))}


def _jackknife(
    sides: Sequence[Sequence[Sums]], strata: Sequence[str], statistic: Statistic, *, n: int
) -> Measured | None:
    """The difference of a statistic between two sides with the same documents."""
    sizes = Counter(strata)
    degrees = len(strata) - len(sizes)
    if degrees < FEWEST_DEGREES:
        return None
    totals = [{name: math.fsum(document[name] for document in side) for name in side[0]} for side in sides]

    def without(index: int) -> float:
        left = [
            statistic({name: total[name] - side[index][name] for name in total})
            for total, side in zip(totals, sides, strict=True)
        ]
        return left[1] - left[0]

    moved: dict[str, list[float]] = {}
    for index, stratum in enumerate(strata):
        moved.setdefault(stratum, []).append(without(index))
    variance = math.fsum(
        (sizes[stratum] - 1) / sizes[stratum] * math.fsum((value - fmean(values)) ** 2 for value in values)
        for stratum, values in moved.items()
    )
    difference = statistic(totals[1]) - statistic(totals[0])
    half = _student(degrees) * math.sqrt(variance)
    return Measured(value=difference, low=difference - half, high=difference + half, n=n)


def _student(degrees: int) -> float:
    """Student's 97.5 % quantile, by its expansion in 1/degrees (Abramowitz and Stegun 26.7.5)."""
    z = 1.959963984540054
    return (
        z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )  # fmt: skip
