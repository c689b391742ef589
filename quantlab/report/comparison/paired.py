"""The paired difference of two records that scored the same documents: errors common to both cancel.

Records hold sums over each document. A number of the table is a function of such sums, and so is a difference. Its interval is
computed as in the matrix: both sides are summed over the same drawn documents (`quantlab.evaluation.statistics`). With too few
documents there is no result.
"""

import numpy as np

from quantlab.evaluation.measured import FEWEST_DEGREES, Measured
from quantlab.evaluation.metric import Metric
from quantlab.evaluation.quality.metrics import Documents
from quantlab.evaluation.record import TaskResult
from quantlab.evaluation.statistics import Floats, resample


def paired(a: Documents | None, b: Documents | None, metric: Metric, *, domain: str = "") -> Measured | None:
    """b - a on the same documents, with its 95 % interval.

    Args:
        a, b: sums of two records.
        metric: the number.
        domain: the kind of text; empty for all.

    Returns:
        None if the records have no sums or too few documents, scored different tokens, or the number is not a function of sums.
    """
    statistic = metric.statistic
    if a is None or b is None or statistic is None or (a.tokens_sha256, a.tokens) != (b.tokens_sha256, b.tokens):
        return None
    _, strata = np.unique(a.domain, return_inverse=True)
    rows = np.array([found == domain or not domain for found in a.domain])
    if rows.sum() - len(np.unique(strata[rows])) < FEWEST_DEGREES:
        return None
    sides = [a.sums(), b.sums()]
    names = [list(side) for side in sides]
    table = np.stack([values[rows] for side in sides for values in side.values()], axis=1)
    split = len(names[0])

    def difference(row: Floats) -> Floats:
        first = statistic({name: row[..., at] for at, name in enumerate(names[0])})
        second = statistic({name: row[..., split + at] for at, name in enumerate(names[1])})
        return second - first

    drawn = resample(table, strata[rows])
    try:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            if not np.isfinite(difference(drawn.draws)).all():  # the baseline is never right
                return None
    except KeyError:  # a baseline has no sums against itself
        return None
    return drawn.measure(difference, n=int(sides[0][metric.count][rows].sum()))


def paired_tasks(a: TaskResult, b: TaskResult, *, of_loss: bool) -> Measured | None:
    """b - a of the score or the loss of one task on the same documents, with its 95 % interval."""
    items = np.array(a.document_items, dtype=np.float64)
    if len(items) <= FEWEST_DEGREES or a.document_items != b.document_items:
        return None
    sign = -1.0 if of_loss and a.higher_is_better else 1.0
    table = np.stack([items, np.array(a.document_scores), np.array(b.document_scores)], axis=1)
    drawn = resample(table, np.zeros(len(items), dtype=np.int64))
    return drawn.measure(lambda row: sign * (row[..., 2] - row[..., 1]) / row[..., 0], n=a.n)
