"""Comparison of two records: their differing properties, every number with its interval, and the differences that can be measured."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quantlab.errors import ArtifactError
from quantlab.evaluation.measured import Frozen, Measured
from quantlab.evaluation.metric import Unit
from quantlab.evaluation.record import Record, TaskKey, TaskResult
from quantlab.report.comparison.paired import paired, paired_tasks
from quantlab.report.comparison.unpaired import exact, subtract
from quantlab.report.matrix.columns import Column, Need, columns_of
from quantlab.report.matrix.rows import Row, build_row, noise_of, task_labels

Verdict = Literal["A is better", "B is better", "no measurable difference", "equal", "not comparable", "not judged"]
UNPAIRED = "unpaired: the records do not hold the scores of the same documents"
GRAMMAR = "a run's directory (runs/NAME), one of its artifacts (runs/NAME/artifacts/VARIANT) or a record (a .json file)"


class Difference(Frozen):
    """A property in which the two records differ."""

    what: str
    a: str
    b: str


class Number(Frozen):
    """One number of both records."""

    key: str
    """Key in matrix.json."""
    heading: str
    unit: Unit
    a: Measured | float | None
    b: Measured | float | None
    difference: Measured | None = None
    """b - a with its 95 % interval; n is the smaller count."""
    paired: bool = False
    """Whether the interval is paired over the same items; otherwise the measurements are independent."""
    verdict: Verdict
    reason: str = ""
    """Reason why the numbers are not comparable or have no verdict."""


class Pair(Frozen):
    """Two records."""

    a: str
    b: str
    variant_a: str
    variant_b: str
    differences: tuple[Difference, ...]
    warnings: tuple[str, ...]
    numbers: tuple[Number, ...]


class Comparison(Frozen):
    """All pairs of two runs, or the one pair of two records."""

    schema_version: Literal[1] = 1
    a: str
    b: str
    pairs: tuple[Pair, ...]
    only_in_a: tuple[str, ...] = ()
    only_in_b: tuple[str, ...] = ()


def compare(
    a: Sequence[tuple[Path, Record]], b: Sequence[tuple[Path, Record]], *, names: tuple[str, str]
) -> Comparison:
    """Compare the records of two sides: a pair of records, or all variants that both sides have.

    Args:
        a, b: records with their files. If only one side has a single record, it is compared with the same variant of the other.
        names: names of the two sides.

    Raises:
        ArtifactError: the sides have no variant in common, or are the same.
    """
    if [path.resolve() for path, _ in a] == [path.resolve() for path, _ in b]:
        raise ArtifactError(
            "both sides are the same",
            where=names[1],
            found=f"the records of {names[0]}",
            fix=f"give another: {GRAMMAR}",
        )
    if len(a) == len(b) == 1:
        return Comparison(a=names[0], b=names[1], pairs=(_pair(a[0], b[0]),))
    ours, theirs = ({record.variant: (path, record) for path, record in side} for side in (a, b))
    shared = [variant for variant in ours if variant in theirs]
    if not shared:
        raise ArtifactError(
            "the two sides have no variant in common",
            where=f"{names[0]} and {names[1]}",
            found=f"{', '.join(ours)} and {', '.join(theirs)}",
            fix="give two records to compare variants of different names",
        )
    return Comparison(
        a=names[0],
        b=names[1],
        pairs=tuple(_pair(ours[variant], theirs[variant]) for variant in shared),
        only_in_a=tuple(variant for variant in ours if variant not in theirs) if len(b) > 1 else (),
        only_in_b=tuple(variant for variant in theirs if variant not in ours) if len(a) > 1 else (),
    )


def _pair(a: tuple[Path, Record], b: tuple[Path, Record]) -> Pair:
    first, second = a[1], b[1]
    rows = (build_row(first), build_row(second))
    barriers = _barriers(first, second)
    # tables have separate columns per machine; here both machines share a row, with the reason why they are not comparable
    numbers = [_number(column, rows, barriers) for column in columns_of(rows)]
    return Pair(
        a=str(a[0]),
        b=str(b[0]),
        variant_a=first.variant,
        variant_b=second.variant,
        differences=tuple(_differences(first, second)),
        warnings=tuple(barrier.sentence for barrier in barriers.values()),
        numbers=tuple(number for number in numbers if number.a is not None or number.b is not None),
    )


@dataclass(frozen=True)
class _Barrier:
    """A difference between two records that makes some of their numbers incomparable.

    Attributes:
        reason: short description: "other suite".
        details: the value in each record.
        consequence: the numbers that are not compared.
    """

    reason: str
    details: str
    consequence: str

    @property
    def sentence(self) -> str:
        return f"{self.reason} ({self.details}): {self.consequence}"


def _barriers(a: Record, b: Record) -> dict[Need, _Barrier]:
    found: dict[Need, _Barrier] = {}
    if a.suite_sha256 != b.suite_sha256:
        details = f"{a.suite} and {b.suite}" if a.suite != b.suite else f"two contents of {a.suite}"
        found["suite"] = _Barrier(
            "other suite", details, "quality and speed were measured differently and are not compared"
        )
    if (a.baseline_sha256 or a.baseline) != (b.baseline_sha256 or b.baseline):
        details = f"{_baseline(a)} and {_baseline(b)}"
        found["baseline"] = _Barrier("other baseline", details, "losses against it are not compared")
    if a.hardware != b.hardware:
        found["hardware"] = _Barrier(
            "other hardware",
            f"{a.hardware} and {b.hardware}",
            "speed, load time and peak memory are not compared",
        )
    return found


def _baseline(record: Record) -> str:
    return f"{record.baseline} {record.baseline_sha256[:12]}".strip()


def _number(column: Column, rows: tuple[Row, Row], barriers: Mapping[Need, _Barrier]) -> Number:
    a, b = (_value(column, row) for row in rows)

    def judged(
        verdict: Verdict, reason: str = "", difference: Measured | None = None, *, is_paired: bool = False
    ) -> Number:
        return Number(
            key=column.key,
            heading=column.heading,
            unit=column.unit,
            a=a,
            b=b,
            difference=difference,
            paired=is_paired,
            verdict=verdict,
            reason=reason,
        )

    if a is None or b is None:
        return judged("not judged", f"not measured in {'A' if a is None else 'B'}")
    reason = _why_not(column, rows, barriers)
    if reason:
        return judged("not comparable", reason)
    noise = [
        f"noisy in {side}: {why}"
        for side, row in zip("AB", rows, strict=True)
        if (why := noise_of(row, column.noise_key))
    ]
    same_items = _paired(column, rows)
    difference = same_items or subtract(exact(b), exact(a))
    if column.metric.of_machine and difference.low == difference.high != 0:
        return judged("not judged", "measured once, so without an interval", difference)
    if noise:
        return judged("not judged", "; ".join(noise), difference)
    if difference.interval == "range":
        return judged("not judged", f"too little for an interval: {difference.reason}", difference)
    is_paired = same_items is not None or 0.0 in (a, b)  # a loss is paired with the baseline
    verdict = _verdict(difference, column)
    if column.group in ("quality", "domains", "tasks") and not is_paired and verdict.endswith("better"):
        return judged("not judged", UNPAIRED, difference)
    return judged(verdict, "", difference, is_paired=is_paired)


def _paired(column: Column, rows: tuple[Row, Row]) -> Measured | None:
    """The difference on the same documents; None if the records do not both hold their sums."""
    if column.task is not None:
        return paired_tasks(*_tasks_of(column, rows), of_loss=column.relative)
    return paired(rows[0].documents, rows[1].documents, column.metric, domain=column.domain)


def _tasks_of(column: Column, rows: tuple[Row, Row]) -> tuple[TaskResult, TaskResult]:
    a, b = (next(task for task in row.tasks if task.key == column.task) for row in rows)
    return a, b


def _value(column: Column, row: Row) -> Measured | float | None:
    """The number; a baseline's loss against itself is exactly zero."""
    found = column.read(row)
    is_baseline = row.variant == row.record.baseline and row.quality is not None
    return 0.0 if found is None and is_baseline and column.metric.loss and column.task is None else found


def _why_not(column: Column, rows: tuple[Row, Row], barriers: Mapping[Need, _Barrier]) -> str:
    if column.task is not None:
        tasks = _tasks_of(column, rows)
        versions = [(task.version, task.data_sha256, task.shots, task.decoding) for task in tasks]
        if versions[0] != versions[1]:
            return f"other version of the task ({tasks[0].version} and {tasks[1].version})"
    for need in column.needs:
        if need in barriers and not (need == "suite" and column.task is not None):
            return barriers[need].reason
    return ""


def _verdict(difference: Measured, column: Column) -> Verdict:
    if difference.low == difference.high == 0:
        return "equal"
    if difference.low <= 0 <= difference.high:
        return "no measurable difference"
    return "B is better" if (difference.value < 0) == (column.better == "low") else "A is better"


def _differences(a: Record, b: Record) -> Iterator[Difference]:
    """Properties, other than numbers, in which the two records differ."""
    for (what, ours), (_, theirs) in zip(_identity(a), _identity(b), strict=True):
        if ours != theirs:
            yield Difference(what=what, a=ours or "–", b=theirs or "–")
    labels = task_labels([*a.tasks, *b.tasks])
    for what, ours_by_name, theirs_by_name in (
        ("version of", a.versions, b.versions),
        ("seed of", {k: str(v) for k, v in a.seeds.items()}, {k: str(v) for k, v in b.seeds.items()}),
        ("task", _tasks(a, labels), _tasks(b, labels)),
    ):
        for name in dict.fromkeys([*ours_by_name, *theirs_by_name]):
            one, other = ours_by_name.get(name, "–"), theirs_by_name.get(name, "–")
            if one != other:
                yield Difference(what=f"{what} {name}", a=one, b=other)


def _identity(record: Record) -> tuple[tuple[str, str], ...]:
    quality, speed = record.quality, record.speed
    return (
        ("variant", record.variant),
        ("passes", record.description),
        ("recipe", record.recipe),
        ("recipe, sha256", record.recipe_sha256[:12]),
        ("artifact, sha256", record.artifact_sha256[:12]),
        ("baseline", _baseline(record)),
        ("suite", record.suite),
        ("suite, sha256", record.suite_sha256[:12]),
        ("compute dtype", quality.compute_dtype if quality else ""),
        ("twin", speed.twin if speed else ""),
        ("layout", speed.layout if speed else ""),
        ("hardware", record.hardware),
        ("command", record.command),
    )


def _tasks(record: Record, labels: Mapping[TaskKey, str]) -> dict[str, str]:
    return {labels[task.key]: f"{task.version} {task.data_sha256[:12]}".strip() for task in record.tasks}
