"""One row of the tables: a view of a record, and the form in which matrix.json holds it."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import quote

from pydantic import BaseModel

from quantlab.evaluation.measured import Measured
from quantlab.evaluation.memory.metrics import Memory
from quantlab.evaluation.metric import Declared, Metric, metrics_of
from quantlab.evaluation.quality.metrics import Divergence, Documents, Quality
from quantlab.evaluation.record import PARTS, Attention, AttentionCell, Failure, Record, TaskKey, TaskResult
from quantlab.evaluation.speed.metrics import Speed

Value = Measured | float | None
METRICS: Final[Mapping[str, tuple[str, Declared]]] = {
    name: (part, declared) for part, model in PARTS.items() for name, declared in metrics_of(model).items()
}
"""Every metric with the part of a record that declares it, by its name in matrix.json."""
_Part = TypeVar("_Part", bound=BaseModel)


@dataclass(frozen=True)
class Row:
    """One variant.

    Attributes:
        record: its numbers, all finite; numbers that are not finite are replaced by failures.
        link: path of the record, relative to the report's directory.
    """

    record: Record
    link: str | None = None

    @property
    def variant(self) -> str:
        return self.record.variant

    @property
    def description(self) -> str:
        return self.record.description

    @property
    def hardware(self) -> str:
        return self.record.hardware

    @property
    def failures(self) -> tuple[Failure, ...]:
        return self.record.failures

    @property
    def tasks(self) -> tuple[TaskResult, ...]:
        return self.record.tasks

    @property
    def quality(self) -> Quality | None:
        return self.record.quality

    @property
    def memory(self) -> Memory | None:
        return self.record.memory

    @property
    def speed(self) -> Speed | None:
        return self.record.speed

    @property
    def divergence(self) -> Divergence | None:
        return self.quality.divergence if self.quality else None

    @property
    def documents(self) -> Documents | None:
        return self.quality.documents if self.quality else None

    @property
    def noise(self) -> Mapping[str, str]:
        """Reasons why cells of speed are noisy, by cell."""
        return self.speed.noise if self.speed else {}

    def value(self, key: str) -> Value:
        """The number of a metric; the key may have a batch size: "decode_tokens_per_second.8"; None if it is missing."""
        name, _, batch = key.partition(".")
        part, declared = METRICS[name]
        found = getattr(getattr(self.record, part), name, None)
        value: Value = (found or {}).get(batch) if declared.by_batch else found
        return value

    def measured(self, key: str) -> Measured | None:
        """The number of a metric whose numbers have intervals."""
        found = self.value(key)
        assert found is None or isinstance(found, Measured), f"{key} has no interval"
        return found

    def number(self, key: str) -> float | None:
        """The number of a metric whose numbers have no intervals."""
        found = self.value(key)
        assert not isinstance(found, Measured), f"{key} has an interval"
        return found

    def by_batch(self, name: str) -> Mapping[str, Measured]:
        """The numbers of a metric by batch size, smallest first."""
        part, _ = METRICS[name]
        found = getattr(getattr(self.record, part), name, None) or {}
        return {batch: found[batch] for batch in in_size(found)}


def build_row(record: Record, *, link: str | None = None) -> Row:
    """The row of a record; numbers that are not finite become failures.

    Args:
        record: one evaluation.
        link: path of the record, relative to the report's directory.
    """
    failures = list(record.failures)
    finite: dict[str, Any] = {part: _if_finite(getattr(record, part), failures, part) for part in PARTS}
    finite["tasks"] = tuple(task for task in record.tasks if _if_finite(task, failures, "tasks"))
    finite["matrix_errors"] = tuple(one for one in record.matrix_errors if _if_finite(one, failures, "quality"))
    finite["tokens_per_expert"] = {block: counts for block, counts in record.tokens_per_expert.items() if counts}
    return Row(record.model_copy(update=finite | {"failures": tuple(failures)}), link)


def row_as_json(row: Row, rows: Sequence[Row]) -> dict[str, object]:
    """The row in the form of matrix.json: its record without the sums over documents, with the fields of its parts flattened.

    Every row has every key that any of `rows` has, so readers need not check for keys; values that were not measured are null.
    """
    record = row.record
    flat: dict[str, object] = {
        "variant": record.variant,
        "description": record.description,
        "passes": record.passes,
        "foreign": record.foreign,
        "artifact": record.artifact,
        "artifact_sha256": record.artifact_sha256,
        "record": row.link,
        "hardware": record.hardware,
    }
    for part, model in PARTS.items():
        for name in [*metrics_of(model), *(name for name in model.model_fields if name not in metrics_of(model))]:
            if name != "documents":
                flat[name] = _field_as_json(getattr(record, part), model, name, rows)
    if record.memory:  # the old key keeps a plain number
        flat |= {"load_seconds": record.memory.load_seconds.value, "load_seconds_interval": record.memory.load_seconds}
    else:
        flat["load_seconds_interval"] = None
    flat["tasks"] = [task.model_dump(exclude={"document_items", "document_scores"}) for task in record.tasks]
    for name in ("tokens_per_expert", "matrix_errors", "failures", "versions"):
        flat[name] = getattr(record, name)
    if any(other.record.engines for other in rows):
        flat["engines"] = record.engines
    return flat


def _field_as_json(part: BaseModel | None, model: type[BaseModel], name: str, rows: Sequence[Row]) -> object:
    """One field of a part of a record, with the keys that all rows have."""
    found = getattr(part, name, None)
    declared = metrics_of(model).get(name)
    if declared is not None and declared.by_batch:
        return {batch: (found or {}).get(batch) for batch in batch_sizes(rows, declared)}
    if name == "domains":
        return {domain: (found or {}).get(domain) for domain in domains_of(rows)}
    if part is None and name in model.model_fields:
        default = model.model_fields[name].default
        return default if default in ({}, (), "") else None
    return found


def domains_of(rows: Sequence[Row]) -> list[str]:
    """The kinds of text on which any row was measured."""
    return sorted({domain for row in rows if row.quality for domain in row.quality.domains})


def batch_sizes(rows: Sequence[Row], declared: Declared) -> list[str]:
    """The batch sizes with keys in matrix.json: those always present, and those of any row."""
    names = [name for name in (declared.name, declared.metric.made_of) if name]
    return in_size(
        {*declared.metric.batches, *(batch for row in rows for name in names for batch in row.by_batch(name))}
    )


def in_size(batches: Iterable[str]) -> list[str]:
    """Batch sizes, smallest first."""
    return sorted(batches, key=lambda batch: (len(batch), batch))


def metric(name: str) -> Metric:
    """The declaration of a metric, by its name in matrix.json."""
    return METRICS[name][1].metric


def link_to(row: Row, field: str = "") -> str | None:
    """URL of a row's record, at one of its fields; None if the report has no record files beside it."""
    if row.link is None:
        return None
    return quote(row.link) + (f"#{quote(field)}" if field else "")


def same_layout(a: Row, b: Row) -> bool:
    """Whether two rows have the same tensors in the same formats, so that they differ only in values."""
    if a.memory is None or b.memory is None or a.memory.weights_bytes != b.memory.weights_bytes:
        return False
    return (a.speed.layout if a.speed else "") == (b.speed.layout if b.speed else "")


def same_changes(a: Row, b: Row) -> bool:
    """Whether the same passes made two rows, ignoring algorithms; False if the passes only cast or there are none."""
    changes = [[one.change for one in row.record.passes] for row in (a, b)]
    return changes[0] == changes[1] and any(operation != "cast" for operation, _ in changes[0])


def task_of(row: Row, key: TaskKey) -> TaskResult | None:
    """The result of one metric and seed of a task."""
    return next((task for task in row.tasks if task.key == key), None)


def task_labels(tasks: Iterable[TaskResult]) -> dict[TaskKey, str]:
    """Label of each task of a table: its name, with metric and seed where the table has several of them."""
    keys = dict.fromkeys(task.key for task in tasks)
    metrics = Counter(name for name, _ in {(name, metric) for name, metric, _ in keys})
    seeds = Counter(name for name, _ in {(name, seed) for name, _, seed in keys})
    return {
        (name, metric, seed): name
        + (f" {metric}" if metrics[name] > 1 else "")
        + (f" seed {seed}" if seeds[name] > 1 else "")
        for name, metric, seed in keys
    }


def noise_of(row: Row, key: str) -> str | None:
    """Reason why the measurement of `key` was disturbed, or None; a ratio is as noisy as the rate it is computed from."""
    name, _, batch = key.partition(".")
    if name not in METRICS:
        return None
    declared = METRICS[name][1]
    if declared.metric.origin:
        return noise_of(row, declared.metric.origin) if declared.metric.origin != key else None
    cells = [key, *([f"{declared.metric.made_of}.{batch}"] if declared.metric.made_of else [])]
    return next((row.noise[cell] for cell in cells if cell in row.noise), None)


def _if_finite(found: _Part | None, failures: list[Failure], cell: str) -> _Part | None:
    """A part of a record, or None and a failure: infinities and NaN are no numbers that a table could show."""
    infinite = list(dict.fromkeys(_infinite(found.model_dump()))) if found is not None else []
    if infinite:
        about = f"{found.name}: " if isinstance(found, TaskResult) else ""
        reason = f"{about}no finite number: {', '.join(infinite)}"
        failures.append(Failure.model_validate({"cell": cell, "reason": reason}))
    return None if infinite else found


def finite_attention(found: Attention | None) -> Attention | None:
    """The same, with a reason in place of cells that hold infinities or NaN."""
    if found is None:
        return None
    cells = [
        AttentionCell(implementation=cell.implementation, context=cell.context, reason=f"no finite number: {', '.join(infinite)}")
        if (infinite := list(dict.fromkeys(_infinite(cell.model_dump()))))
        else cell
        for cell in found.cells
    ]  # fmt: skip
    return found.model_copy(update={"cells": tuple(cells)})


def _infinite(found: object, path: str = "") -> Iterator[str]:
    """Paths of the numbers that are infinite or NaN; of a measured one, its own path."""
    if isinstance(found, float) and not math.isfinite(found):
        yield path
    elif isinstance(found, dict):
        for key, value in found.items():
            yield from _infinite(value, path if key in ("value", "low", "high") else f"{path}.{key}".lstrip("."))
    elif isinstance(found, list | tuple):
        for value in found:
            yield from _infinite(value, path)
