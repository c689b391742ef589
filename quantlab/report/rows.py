"""One row of the tables: everything of a record that is compared, as matrix.json holds it.

Every key stands in every row, so a reader can index without asking first; what was not measured is null.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from quantlab.evaluation.record import (
    Divergence,
    Domain,
    Failure,
    MatrixErrors,
    Measured,
    Memory,
    Quality,
    Record,
    Significance,
    Speed,
    TaskResult,
)

_DECODE_BATCHES = ("1", "8")
_PREFILL_BATCHES = ("1",)


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
    quality, speed = _finite_quality(record.quality, failures), _finite_speed(record.speed, failures)
    return Row(
        variant=record.variant,
        description=record.description,
        artifact=record.artifact,
        artifact_sha256=record.artifact_sha256,
        record=link,
        hardware=record.hardware,
        **_quality_fields(quality, keys),
        **_memory_fields(record.memory),
        **_speed_fields(speed, keys),
        tasks=record.tasks,
        tokens_per_expert=record.tokens_per_expert,
        matrix_errors=record.matrix_errors,
        failures=tuple(failures),
        versions=record.versions,
    )


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
    }


def _batch_sizes(named: Iterable[str], measured: Iterable[Mapping[str, Measured]]) -> tuple[str, ...]:
    """All batch sizes of a table, smallest first."""
    return tuple(sorted({*named, *(batch for keys in measured for batch in keys)}, key=lambda name: (len(name), name)))


def _memory_percent(memory: Memory | None) -> float | None:
    if memory is None or memory.fp16_weights_bytes <= 0:
        return None
    return 100 * memory.weights_bytes / memory.fp16_weights_bytes


def _is_finite(measured: Measured | None) -> bool:
    return measured is None or all(math.isfinite(number) for number in (measured.value, measured.low, measured.high))


def _finite_quality(quality: Quality | None, failures: list[Failure]) -> Quality | None:
    """The quality, or None and a failure: an artifact that answers with infinities has no quality worth a column."""
    if quality is None:
        return None
    numbers: dict[str, Measured | None] = {
        "perplexity": quality.perplexity,
        "bits per byte": quality.bits_per_byte,
        "next-token accuracy": quality.next_token_accuracy,
        "perplexity change": quality.perplexity_change_percent,
        "accuracy loss": quality.accuracy_loss_percent,
        "KL to the baseline": quality.kl_to_baseline,
        "top-1 agreement": quality.top1_agreement,
    }
    for name, domain in quality.domains.items():
        numbers |= {f"perplexity on {name}": domain.perplexity, f"bits per byte on {name}": domain.bits_per_byte}
    return quality if _all_finite(numbers, failures, cell="quality") else None


def _finite_speed(speed: Speed | None, failures: list[Failure]) -> Speed | None:
    if speed is None:
        return None
    numbers: dict[str, Measured | None] = {}
    for label, by_batch in (
        ("decode tokens per second", speed.decode_tokens_per_second),
        ("prefill tokens per second", speed.prefill_tokens_per_second),
        ("decode over FP16", speed.decode_over_fp16),
        ("prefill over FP16", speed.prefill_over_fp16),
    ):
        numbers |= {f"{label} at batch {batch}": measured for batch, measured in by_batch.items()}
    return speed if _all_finite(numbers, failures, cell="speed") else None


def _all_finite(
    numbers: Mapping[str, Measured | None], failures: list[Failure], *, cell: Literal["quality", "speed"]
) -> bool:
    infinite = [name for name, measured in numbers.items() if not _is_finite(measured)]
    if infinite:
        failures.append(Failure(cell=cell, reason=f"no finite number: {', '.join(infinite)}"))
    return not infinite
