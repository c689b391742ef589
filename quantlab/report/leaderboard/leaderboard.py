"""The leaderboard: the records of several runs in one ranked table, built only from records.

Numbers in one column must be comparable: all records must share suite, baseline and task versions, otherwise building fails.
Speed depends on the machine, so every machine has its own columns.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic_core import to_json

from quantlab.errors import ArtifactError
from quantlab.evaluation.record import Record, TaskKey
from quantlab.report.comparison.paired import paired
from quantlab.report.matrix.matrix import Matrix
from quantlab.report.matrix.row_verdicts import summary
from quantlab.report.matrix.rows import Row, build_row, metric, row_as_json

NAME = "leaderboard"
_RANKED_BY: Final = "kl_to_baseline"


@dataclass(frozen=True)
class Place:
    """The rank of one record.

    Attributes:
        best, worst: range of ranks: the record is surely behind `best` - 1 others and surely ahead of all ranked after `worst`.
        run: the run's directory as given.
        recipe: recipe of the run.
        verdict: summary of its losses.
        row: its numbers.
    """

    best: int
    worst: int
    run: str
    recipe: str
    verdict: str | None
    row: Row

    @property
    def rank(self) -> str:
        return f"{self.best}" if self.best == self.worst else f"{self.best}–{self.worst}"

    def as_json(self, rows: Sequence[Row]) -> dict[str, object]:
        """The entry in the form of leaderboard.json; `rows` are the rows of all entries."""
        about = {name: getattr(self, name) for name in ("best", "worst", "run", "recipe", "verdict")}
        return about | {"row": row_as_json(self.row, rows)}


@dataclass(frozen=True)
class Leaderboard:
    """All records, ranked by KL to the baseline, which responds to every change of a prediction; best first.

    Attributes:
        suite, suite_sha256, baseline, baseline_sha256: common to all records.
        hardware: the machines.
        places: the ranked records.
        unranked: the baseline, and records without a comparison with it.
    """

    suite: str
    suite_sha256: str
    baseline: str
    baseline_sha256: str
    hardware: tuple[str, ...]
    places: tuple[Place, ...]
    unranked: tuple[Place, ...] = ()

    def to_json(self) -> str:
        """The text of leaderboard.json."""
        names = ("suite", "suite_sha256", "baseline", "baseline_sha256", "hardware")
        rows = [place.row for place in (*self.places, *self.unranked)]
        places = {name: [place.as_json(rows) for place in getattr(self, name)] for name in ("places", "unranked")}
        return to_json({"schema": 1} | {name: getattr(self, name) for name in names} | places, indent=2).decode() + "\n"

    def as_matrix(self) -> Matrix:
        """The same rows as a matrix, for tables and plots."""
        places = (*self.places, *self.unranked)
        digests = "\n".join(place.row.record.artifact_sha256 for place in places)
        return Matrix(
            recipe=NAME,
            recipe_sha256=hashlib.sha256(digests.encode()).hexdigest(),
            baseline=self.baseline,
            hardware=" / ".join(self.hardware),
            suite=self.suite,
            suite_sha256=self.suite_sha256,
            rows=tuple(place.row for place in places),
        )


def build_leaderboard(runs: Sequence[tuple[str, Sequence[tuple[str, Record]]]]) -> Leaderboard:
    """Merge the records of runs.

    Args:
        runs: name of each run with its records, each with the link to its file.

    Raises:
        ArtifactError: two records differ in suite, baseline or the version of a task, so they cannot share a column.
    """
    entries = [(name, link, record) for name, records in runs for link, record in records]
    if not entries:
        raise ArtifactError("there are no records to rank", fix="give the directories of runs that were measured")
    _refuse_mixtures(entries)
    first = entries[0][2]
    entries = _without_repeated_baselines(entries)
    names = _names(entries)
    rows = [
        build_row(record.model_copy(update={"variant": name}), link=link)
        for name, (_, link, record) in zip(names, entries, strict=True)
    ]
    described = list(zip(rows, entries, strict=True))
    ranked = sorted((pair for pair in described if pair[0].measured(_RANKED_BY)), key=lambda pair: _order(pair[0]))
    return Leaderboard(
        suite=first.suite,
        suite_sha256=first.suite_sha256,
        baseline=first.baseline,
        baseline_sha256=first.baseline_sha256,
        hardware=tuple(sorted({record.hardware for _, _, record in entries})),
        places=tuple(
            _place(row, entry, ranks=ranks)
            for (row, entry), ranks in zip(ranked, _ranks([row for row, _ in ranked]), strict=True)
        ),
        unranked=tuple(_place(row, entry, ranks=(0, 0)) for row, entry in described if not row.measured(_RANKED_BY)),
    )


def _order(row: Row) -> tuple[float, float, str]:
    distance, memory = row.measured(_RANKED_BY), row.number("memory_percent_of_fp16")
    return (distance.value if distance else 0.0, 1e9 if memory is None else memory, row.variant)


def _ranks(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Best and worst rank of each of the ordered rows: after all rows that are surely better, before all that are surely worse."""
    better, worse = [0] * len(rows), [0] * len(rows)
    for near, far in itertools.combinations(range(len(rows)), 2):
        if _is_surely_nearer(rows[near], rows[far]):
            better[far] += 1
            worse[near] += 1
    return [(1 + ahead, len(rows) - behind) for ahead, behind in zip(better, worse, strict=True)]


def _is_surely_nearer(a: Row, b: Row) -> bool:
    """Whether a's KL is measurably below b's: by the paired difference if possible, else by both intervals."""
    difference = paired(a.documents, b.documents, metric(_RANKED_BY))
    if difference is not None:
        return difference.low > 0
    near, far = a.measured(_RANKED_BY), b.measured(_RANKED_BY)
    return near is not None and far is not None and near.high < far.low


def _place(row: Row, entry: tuple[str, str, Record], *, ranks: tuple[int, int]) -> Place:
    return Place(best=ranks[0], worst=ranks[1], run=entry[0], recipe=entry[2].recipe, verdict=summary(row), row=row)


def _without_repeated_baselines(entries: Sequence[tuple[str, str, Record]]) -> list[tuple[str, str, Record]]:
    """Keep one baseline row per machine: every run has a row of the common baseline."""
    kept, seen = [], set()
    for name, link, record in entries:
        if record.variant == record.baseline:
            if record.hardware in seen:
                continue
            seen.add(record.hardware)
        kept.append((name, link, record))
    return kept


def _names(entries: Sequence[tuple[str, str, Record]]) -> list[str]:
    """Names of the rows: `variant` if only one run has it, else `run/variant`; the baseline keeps its name."""
    variants = [record.variant for _, _, record in entries]
    names: list[str] = []
    for run, _, record in entries:
        alone = variants.count(record.variant) == 1 or (
            record.variant == record.baseline and record.variant not in names
        )
        name = record.variant if alone else f"{Path(run).name}/{record.variant}"
        copies = 2
        unique = name
        while unique in names:
            unique, copies = f"{name} ({copies})", copies + 1
        names.append(unique)
    return names


def _refuse_mixtures(entries: Sequence[tuple[str, str, Record]]) -> None:
    first_run, _, first = entries[0]
    tasks: dict[TaskKey, tuple[str, tuple[object, ...]]] = {}
    for run, _, record in entries:
        here, there = f"{record.variant} of {run}", f"{first.variant} of {first_run}"
        for label, ours, theirs in (
            ("suite", first.suite, record.suite),
            ("contents of the suite", first.suite_sha256, record.suite_sha256),
            ("baseline", first.baseline, record.baseline),
            ("artifact of the baseline", first.baseline_sha256, record.baseline_sha256),
        ):
            if ours != theirs:
                raise _mixture(label, (here, theirs), (there, ours))
        for task in record.tasks:
            made = (task.version, task.data_sha256, task.shots, task.decoding)
            where, known = tasks.setdefault(task.key, (here, made))
            if known != made:
                differing = next((a, b) for a, b in zip(known, made, strict=True) if a != b)
                raise _mixture(
                    f"version of the task {task.name}", (here, str(differing[1])), (where, str(differing[0]))
                )


def _mixture(label: str, here: tuple[str, str], there: tuple[str, str]) -> ArtifactError:
    return ArtifactError(
        f"records that differ in the {label} cannot stand in one column",
        where=f"{here[0]} and {there[0]}",
        found=f"`{here[1]}` and `{there[1]}`",
        fix="measure both with the same suite and baseline (`quantlab eval`), or make a leaderboard of each kind",
    )
