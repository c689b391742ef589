"""The result of a task from the scores of its items, paired with the baseline on the same items."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from quantlab.errors import EvaluationError
from quantlab.evaluation.measured import Measured, Significance, verdict
from quantlab.evaluation.record import TaskResult
from quantlab.evaluation.statistics import Floats, Resampled, mcnemar, resample
from quantlab.files import write_atomically

_FEWEST_UNITS = 5  # fewer documents are not representative; statistics.py has the minimum for an interval


class ItemScores(BaseModel):
    """The scores of one task, item by item. Everything except the scores must be equal for two compared models."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    version: str
    source: Literal["quantlab", "lm-eval"] = "quantlab"
    metric: str
    higher_is_better: bool = True
    random_baseline: float | None = None
    decoding: str = "log-likelihood"
    shots: int = 0
    seed: int = 0
    data_sha256: str = ""
    documents: tuple[str, ...]
    """The document that each item was made from; the bootstrap draws documents, not items."""
    groups: tuple[str, ...]
    """Group of each item."""
    scores: tuple[float, ...]
    """Score of each item."""


class _Kept(BaseModel):
    """Contents of the file with the baseline's scores."""

    key: str
    tasks: tuple[ItemScores, ...]


def save_scores(path: Path, key: str, found: ItemScores) -> None:
    """Add the baseline's scores of one task to those stored under the same key.

    Raises:
        ArtifactError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    others = tuple(one for one in saved_scores(path, key) if same_task(found, [one]) is None)
    write_atomically(path, _Kept(key=key, tasks=(*others, found)).model_dump_json().encode())


def saved_scores(path: Path, key: str) -> tuple[ItemScores, ...]:
    """The baseline's scores in `path`; empty if they were not stored under `key`."""
    try:
        kept = TypeAdapter(_Kept).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return ()
    return kept.tasks if kept.key == key else ()


def same_task(found: ItemScores | TaskResult, others: Sequence[ItemScores]) -> ItemScores | None:
    """The entry of `others` with the same task, metric, seed and shots; None if there is none."""
    wanted = (found.name, found.metric, found.seed, found.shots)
    return next((one for one in others if (one.name, one.metric, one.seed, one.shots) == wanted), None)


def summarise_task(found: ItemScores, baseline: ItemScores | None) -> TaskResult:
    """The task's result for a record.

    Args:
        found: the artifact's scores.
        baseline: the baseline's scores on the same items; None for the baseline itself.

    Raises:
        EvaluationError: there are too few items, a score is not finite, or the baseline answered other items.
    """
    if not np.isfinite(found.scores).all():
        raise EvaluationError(
            "a score is not a number",
            where=f"task {found.name}",
            found=f"{int((~np.isfinite(found.scores)).sum())} of {len(found.scores)} items",
            fix=f"choose another metric than {found.metric}, or check the artifact with `quantlab verify`",
        )
    if baseline is not None and found.model_dump(exclude={"scores"}) != baseline.model_dump(exclude={"scores"}):
        raise EvaluationError(
            "the artifact and the baseline answered different items",
            where=f"task {found.name}",
            found=f"{len(found.scores)} items of version {found.version}, {len(baseline.scores)} of {baseline.version}",
            fix="evaluate the baseline again with `--again`",
        )
    sums = _resampled(found, baseline)
    n = len(found.scores)
    result = TaskResult(
        name=found.name,
        version=found.version,
        source=found.source,
        metric=found.metric,
        higher_is_better=found.higher_is_better,
        score=sums.measure(_mean, n=n),
        n=n,
        random_baseline=found.random_baseline,
        by_group=_by_group(found),
        decoding=found.decoding,
        shots=found.shots,
        seed=found.seed,
        data_sha256=found.data_sha256,
        document_items=tuple(int(count) for count in np.bincount(_document(found))),
        document_scores=tuple(float(total) for total in np.bincount(_document(found), weights=found.scores)),
    )
    if baseline is None:
        return result
    sign = 1.0 if found.higher_is_better else -1.0
    loss, significance = sums.compare(lambda row: sign * (row[..., 2] - row[..., 1]) / row[..., 0], n=n)
    compared = {"baseline_score": float(np.mean(baseline.scores)), "loss": loss, "significance": significance}
    if set(found.scores) | set(baseline.scores) <= {0.0, 1.0}:
        pairs = list(zip(baseline.scores, found.scores, strict=True))
        to_wrong, to_right = pairs.count((1.0, 0.0)), pairs.count((0.0, 1.0))
        compared |= {"to_wrong": to_wrong, "to_right": to_right}
        if significance is not None:
            compared["significance"] = Significance(p=mcnemar(to_wrong, to_right), verdict=verdict(loss))
    return result.model_copy(update=compared)


def _document(found: ItemScores) -> NDArray[np.int64]:
    """The document of each item, as an index into the sorted document names."""
    return np.unique(np.array(found.documents), return_inverse=True)[1]


def _mean(row: Floats) -> Floats:
    return row[..., 1] / row[..., 0]


def _resampled(found: ItemScores, baseline: ItemScores | None) -> Resampled:
    """Per-document sums of items, scores and baseline scores, resampled; stratified by group if every group has enough documents."""
    names, document = np.unique(np.array(found.documents), return_inverse=True)
    if len(names) < _FEWEST_UNITS:
        raise EvaluationError(
            "a task has too few items",
            where=f"task {found.name}",
            found=f"{len(found.scores)} items from {len(names)} documents",
            fix=f"give it items from at least {_FEWEST_UNITS} documents",
        )
    other = baseline.scores if baseline is not None else found.scores
    columns = [np.bincount(document, weights=weights) for weights in ([1.0] * len(document), found.scores, other)]
    table: Floats = np.stack(columns, axis=1).astype(np.float64)
    groups, group = np.unique(np.array(found.groups), return_inverse=True)
    strata = np.zeros(len(names), dtype=np.int64)
    strata[document] = group
    if np.bincount(strata, minlength=len(groups)).min() < _FEWEST_UNITS:
        strata[:] = 0
    return resample(table, strata)


def _by_group(found: ItemScores) -> dict[str, Measured]:
    """The score of every group with enough documents; empty if there is only one group."""
    names = list(dict.fromkeys(found.groups))
    if len(names) == 1:
        return {}
    scores = {}
    for name in names:
        rows = [index for index, group in enumerate(found.groups) if group == name]
        if len({found.documents[index] for index in rows}) < _FEWEST_UNITS:
            continue
        fields = {
            field: tuple(getattr(found, field)[index] for index in rows) for field in ("documents", "groups", "scores")
        }
        scores[name] = _resampled(found.model_copy(update=fields), None).measure(_mean, n=len(rows))
    return scores
