"""One row of the tables: everything of a record that is compared, as matrix.json holds it.

Every key stands in every row, so a reader can index without asking first; what was not measured is null.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field

from quantlab.evaluation.record import (
    Attention,
    AttentionCell,
    Divergence,
    Documents,
    Domain,
    Expanded,
    Failure,
    MatrixErrors,
    Measured,
    Memory,
    Quality,
    Record,
    Significance,
    Speed,
    TaskKey,
    TaskResult,
)

_DECODE_BATCHES = ("1", "8")
_PREFILL_BATCHES = ("1",)
_Part = TypeVar("_Part", bound=BaseModel)


class Frozen(BaseModel):
    """Strict and immutable; the strings under the fields document them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Row(Frozen):
    """One variant."""

    variant: str
    description: str
    """The passes in one line, for people."""
    artifact: str
    artifact_sha256: str
    record: str | None = None
    """The record these numbers come from, relative to the directory of the report."""
    hardware: str = ""
    accuracy_loss_percent: Measured | None
    """Next-token accuracy lost, in percent of the baseline's; null for the baseline, as are the other changes against it."""
    memory_percent_of_fp16: float | None
    """Bytes the runtime holds for weights, in percent of the same weights at two bytes each."""
    speed_over_fp16: Measured | None
    """Decode speed at batch 1 over that of the FP16 twin."""
    perplexity: Measured | None
    perplexity_change_percent: Measured | None
    kl_to_baseline: Measured | None
    """Nats per token."""
    top1_agreement: Measured | None
    """Share of tokens, 0 to 1."""
    bits_per_byte: Measured | None
    next_token_accuracy: Measured | None
    """Share of tokens, 0 to 1."""
    divergence: Divergence | None = None
    documents: Documents | None = Field(default=None, exclude=True)
    """Sums over documents, which pair rows with each other; in records only."""
    significance: dict[str, Significance] = {}
    """Of the changes against the baseline, by their names here."""
    tasks: tuple[TaskResult, ...] = ()
    compute_dtype: str | None
    """Dtype of the activations while quality was measured."""
    domains: dict[str, Domain | None]
    weights_bytes: int | None
    fp16_weights_bytes: int | None
    quantized_weights_percent_of_fp16: float | None
    """Of the tensors a pass quantized only, scales included."""
    artifact_bytes: int | None
    peak_memory_bytes: int | None
    peak_memory_of: Literal["process", "cuda"] | None = None
    """Which memory that is: the resident size of a process, or what torch's allocator held on the GPU."""
    kv_cache_bytes_per_token: int | None = None
    kv_cache: str = ""
    expanded: tuple[Expanded, ...] = Field(default=(), exclude=True)
    """Quantized matrices that no kernel multiplies by; in records only."""
    load_seconds: float | None
    load_seconds_interval: Measured | None
    decode_tokens_per_second: dict[str, Measured | None]
    """Of the random-weight twin; keys are batch sizes, as in the next five."""
    prefill_tokens_per_second: dict[str, Measured | None]
    decode_over_fp16: dict[str, Measured | None]
    prefill_over_fp16: dict[str, Measured | None]
    time_to_first_token_seconds: dict[str, Measured | None] = {}
    energy_joules_per_token: dict[str, Measured | None] = {}
    quartiles: dict[str, tuple[float, float]] = {}
    """First and third quartile over rounds, by cell: "decode_tokens_per_second.1"."""
    noise: dict[str, str] = {}
    """Why a cell of speed is no fact, by cell; such a cell is marked and no recommendation rests on it."""
    tokens_per_expert: dict[str, tuple[int, ...]] = {}
    """Calibration tokens of every routed expert, by block; empty where none was watched."""
    matrix_errors: tuple[MatrixErrors, ...] = ()
    twin_memory_percent_of_fp16: float | None = None
    """Bytes the twin holds for its weights, in percent of the same weights at two bytes each."""
    twin: str | None
    layout: str | None
    """What was timed."""
    not_fused: str = Field(default="", exclude=True)
    """Why decode steps ran transformers' forward functions and were not fused, empty where they were; in records and notes only."""
    failures: tuple[Failure, ...]
    versions: dict[str, str]


@dataclass(frozen=True)
class Keys:
    """What every row of a table has an entry for, measured or not.

    Attributes:
        domains: kinds of text.
        decode, prefill: batch sizes, smallest first.
        first_token, energy: batch sizes of time to first token and of energy; empty where nothing was measured.
    """

    domains: tuple[str, ...]
    decode: tuple[str, ...]
    prefill: tuple[str, ...]
    first_token: tuple[str, ...]
    energy: tuple[str, ...]


def keys_of(records: Sequence[Record]) -> Keys:
    """The keys that the rows of these records share."""
    speeds = [record.speed for record in records if record.speed]
    return Keys(
        domains=tuple(sorted({name for record in records if record.quality for name in record.quality.domains})),
        decode=_batch_sizes(
            _DECODE_BATCHES,
            [keys for speed in speeds for keys in (speed.decode_tokens_per_second, speed.decode_over_fp16)],
        ),
        prefill=_batch_sizes(
            _PREFILL_BATCHES,
            [keys for speed in speeds for keys in (speed.prefill_tokens_per_second, speed.prefill_over_fp16)],
        ),
        first_token=_batch_sizes((), [speed.time_to_first_token_seconds for speed in speeds]),
        energy=_batch_sizes((), [speed.energy_joules_per_token or {} for speed in speeds]),
    )


def build_row(record: Record, keys: Keys, *, link: str | None = None) -> Row:
    """The row of a record; numbers that are not finite become failures.

    Args:
        record: one evaluation.
        keys: what every row of the table has an entry for.
        link: where the record lies, relative to the directory of the report.
    """
    failures = list(record.failures)
    quality = _if_finite(record.quality, failures, "quality")
    memory = _if_finite(record.memory, failures, "memory")
    speed = _if_finite(record.speed, failures, "speed")
    tasks = tuple(task for task in record.tasks if _if_finite(task, failures, "tasks"))
    errors = tuple(found for found in record.matrix_errors if _if_finite(found, failures, "quality"))
    return Row(
        variant=record.variant,
        description=record.description,
        artifact=record.artifact,
        artifact_sha256=record.artifact_sha256,
        record=link,
        hardware=record.hardware,
        **_quality_fields(quality, keys),
        **_memory_fields(memory),
        **_speed_fields(speed, keys),
        documents=quality.documents if quality else None,
        tasks=tuple(task.model_copy(update={"document_items": (), "document_scores": ()}) for task in tasks),
        tokens_per_expert={block: counts for block, counts in record.tokens_per_expert.items() if counts},
        matrix_errors=errors,
        failures=tuple(failures),
        versions=record.versions,
    )


def passes_of(row: Row) -> int:
    """How many passes made it; a description names them one behind the other."""
    return row.description.count(" → ") + 1


def link_to(row: Row, field: str = "") -> str | None:
    """URL of the record of a row, at one of its fields; None where no record lies beside the report."""
    if row.record is None:
        return None
    return quote(row.record) + (f"#{quote(field)}" if field else "")


def same_layout(a: Row, b: Row) -> bool:
    """Whether two rows hold the same tensors in the same formats, so that they differ in the values alone."""
    layouts = [(row.layout or "").partition(", timed once with ")[0] for row in (a, b)]
    return a.weights_bytes is not None and a.weights_bytes == b.weights_bytes and layouts[0] == layouts[1]


def task_of(row: Row, key: TaskKey) -> TaskResult | None:
    """The result of one metric and seed of a task."""
    return next((task for task in row.tasks if task.key == key), None)


def task_labels(tasks: Iterable[TaskResult]) -> dict[TaskKey, str]:
    """What each task of a table is called: its name, with metric and seed where the table has several of them."""
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
    """Why the number under `key` cannot be taken for a fact; a ratio is as noisy as the rate it is made of."""
    names = [key]
    if key == "speed_over_fp16":
        names = ["decode_over_fp16.1", "decode_tokens_per_second.1"]
    elif "_over_fp16." in key:
        names = [key, key.replace("_over_fp16.", "_tokens_per_second.")]
    return next((row.noise[name] for name in names if name in row.noise), None)


def _quality_fields(quality: Quality | None, keys: Keys) -> dict[str, Any]:
    names = (
        "accuracy_loss_percent",
        "perplexity",
        "perplexity_change_percent",
        "kl_to_baseline",
        "top1_agreement",
        "bits_per_byte",
        "next_token_accuracy",
        "compute_dtype",
        "divergence",
    )
    fields: dict[str, Any] = {name: getattr(quality, name) if quality else None for name in names}
    fields["domains"] = {name: quality.domains.get(name) if quality else None for name in keys.domains}
    fields["significance"] = quality.significance if quality else {}
    return fields


def _memory_fields(memory: Memory | None) -> dict[str, Any]:
    names = (
        "weights_bytes",
        "fp16_weights_bytes",
        "quantized_weights_percent_of_fp16",
        "artifact_bytes",
        "peak_memory_bytes",
        "peak_memory_of",
        "kv_cache_bytes_per_token",
    )
    fields: dict[str, Any] = {name: getattr(memory, name) if memory else None for name in names}
    fields["memory_percent_of_fp16"] = _memory_percent(memory)
    fields["load_seconds"] = memory.load_seconds.value if memory else None
    fields["load_seconds_interval"] = memory.load_seconds if memory else None
    fields["kv_cache"] = memory.kv_cache if memory else ""
    fields["expanded"] = memory.expanded if memory else ()
    return fields


def _speed_fields(speed: Speed | None, keys: Keys) -> dict[str, Any]:
    def by_batch(batches: Iterable[str], name: str) -> dict[str, Measured | None]:
        found: Mapping[str, Measured] = (getattr(speed, name) or {}) if speed else {}
        return {batch: found.get(batch) for batch in batches}

    return {
        "speed_over_fp16": speed.decode_over_fp16.get("1") if speed else None,
        "decode_tokens_per_second": by_batch(keys.decode, "decode_tokens_per_second"),
        "prefill_tokens_per_second": by_batch(keys.prefill, "prefill_tokens_per_second"),
        "decode_over_fp16": by_batch(keys.decode, "decode_over_fp16"),
        "prefill_over_fp16": by_batch(keys.prefill, "prefill_over_fp16"),
        "time_to_first_token_seconds": by_batch(keys.first_token, "time_to_first_token_seconds"),
        "energy_joules_per_token": by_batch(keys.energy, "energy_joules_per_token"),
        "quartiles": speed.quartiles if speed else {},
        "noise": speed.noise if speed else {},
        "twin_memory_percent_of_fp16": speed.twin_memory_percent_of_fp16 if speed else None,
        "twin": speed.twin if speed else None,
        "layout": speed.layout if speed else None,
        "not_fused": (speed.not_fused or "") if speed else "",
    }


def _batch_sizes(named: Iterable[str], measured: Iterable[Mapping[str, Measured]]) -> tuple[str, ...]:
    """All batch sizes of a table, smallest first."""
    return tuple(sorted({*named, *(batch for keys in measured for batch in keys)}, key=lambda name: (len(name), name)))


def _memory_percent(memory: Memory | None) -> float | None:
    if memory is None or memory.fp16_weights_bytes <= 0:
        return None
    return 100 * memory.weights_bytes / memory.fp16_weights_bytes


def _if_finite(
    found: _Part | None, failures: list[Failure], cell: Literal["quality", "memory", "speed", "tasks"]
) -> _Part | None:
    """A part of a record, or None and a failure: what answers with infinities has no numbers worth a column."""
    infinite = list(dict.fromkeys(_infinite(found.model_dump()))) if found is not None else []
    if infinite:
        about = f"{found.name}: " if isinstance(found, TaskResult) else ""
        failures.append(Failure(cell=cell, reason=f"{about}no finite number: {', '.join(infinite)}"))
    return None if infinite else found


def finite_attention(found: Attention | None) -> Attention | None:
    """The same, with a reason in place of cells that hold what is no number."""
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
    """Where the numbers stand that are none; of a measured one, its own place."""
    if isinstance(found, float) and not math.isfinite(found):
        yield path
    elif isinstance(found, dict):
        for key, value in found.items():
            yield from _infinite(value, path if key in ("value", "low", "high") else f"{path}.{key}".lstrip("."))
    elif isinstance(found, list | tuple):
        for value in found:
            yield from _infinite(value, path)
