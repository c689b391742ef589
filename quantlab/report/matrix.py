"""The matrix of one recipe: its records side by side, one row per variant, as matrix.json holds it.

`matrix.json` is an interface other tools read: later versions may add fields, never rename these. Every key stands in
every row, so a reader can index without asking first; what was not measured is null.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from quantlab.errors import ArtifactError
from quantlab.evaluation.record import Domain, Failure, Measured, Memory, Quality, Record, Speed

_DECODE_BATCHES = ("1", "8")
_PREFILL_BATCHES = ("1",)


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Row(_Frozen):
    """One variant."""

    variant: str
    description: str
    """The passes in one line, for people."""
    artifact: str
    artifact_sha256: str
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
    compute_dtype: str | None
    """Dtype of the activations while quality was measured."""
    domains: dict[str, Domain | None]
    weights_bytes: int | None
    fp16_weights_bytes: int | None
    quantized_weights_percent_of_fp16: float | None
    """Of the tensors a pass quantized only, scales included."""
    artifact_bytes: int | None
    peak_memory_bytes: int | None
    load_seconds: float | None
    load_seconds_interval: Measured | None
    decode_tokens_per_second: dict[str, Measured | None]
    """Of the random-weight twin; keys are batch sizes, as in the next three."""
    prefill_tokens_per_second: dict[str, Measured | None]
    decode_over_fp16: dict[str, Measured | None]
    prefill_over_fp16: dict[str, Measured | None]
    tokens_per_expert: dict[str, tuple[int, ...]] = {}
    """Calibration tokens of every routed expert, by block; empty where none was watched."""
    twin: str | None
    layout: str | None
    """What was timed."""
    failures: tuple[Failure, ...]
    versions: dict[str, str]


class Matrix(_Frozen):
    """The records of one recipe, relative to its baseline."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    recipe: str
    recipe_sha256: str
    baseline: str
    """The variant that losses are measured against."""
    hardware: str
    suite: str
    suite_sha256: str
    rows: tuple[Row, ...]

    def to_json(self) -> str:
        """The text of matrix.json."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


def build_matrix(records: Sequence[Record]) -> Matrix:
    """Put the records of one recipe side by side.

    Args:
        records: one per variant, in the order the rows shall have.

    Raises:
        ArtifactError: there is no record, a variant appears twice, or the records do not belong together.
    """
    if not records:
        raise ArtifactError("there are no records to report", fix="run `quantlab eval` first")
    _refuse_strangers(records)
    first = records[0]
    speeds = [record.speed for record in records if record.speed]
    decode = _batch_sizes(
        _DECODE_BATCHES, [keys for speed in speeds for keys in (speed.decode_tokens_per_second, speed.decode_over_fp16)]
    )
    prefill = _batch_sizes(
        _PREFILL_BATCHES,
        [keys for speed in speeds for keys in (speed.prefill_tokens_per_second, speed.prefill_over_fp16)],
    )
    domains = sorted({name for record in records if record.quality for name in record.quality.domains})
    return Matrix(
        recipe=first.recipe,
        recipe_sha256=first.recipe_sha256,
        baseline=first.baseline,
        hardware=first.hardware,
        suite=first.suite,
        suite_sha256=first.suite_sha256,
        rows=tuple(_row(record, domains=domains, decode=decode, prefill=prefill) for record in records),
    )


def _refuse_strangers(records: Sequence[Record]) -> None:
    """Rows are compared with each other, so they must come from one recipe, suite, baseline and machine."""
    first = records[0]
    seen: set[str] = set()
    for record in records:
        if record.variant in seen:
            raise ArtifactError(
                "two records of one variant",
                where=record.variant,
                found="the variant again",
                fix="keep one record per variant",
            )
        seen.add(record.variant)
        for label, ours, theirs in (
            ("recipe", first.recipe, record.recipe),
            ("recipe_sha256", first.recipe_sha256, record.recipe_sha256),
            ("baseline", first.baseline, record.baseline),
            ("baseline_sha256", first.baseline_sha256, record.baseline_sha256),
            ("suite", first.suite, record.suite),
            ("suite_sha256", first.suite_sha256, record.suite_sha256),
            ("hardware", first.hardware, record.hardware),
        ):
            if ours != theirs:
                raise ArtifactError(
                    "records that cannot stand in one matrix",
                    where=f"{record.variant}, {label}",
                    found=f"`{theirs}`, but `{ours}` in {first.variant}",
                    fix="run `quantlab eval` again for all variants with one recipe, on one machine",
                )


def _batch_sizes(named: Iterable[str], measured: Iterable[Mapping[str, Measured]]) -> list[str]:
    """All batch sizes of the matrix, smallest first."""
    return sorted({*named, *(batch for keys in measured for batch in keys)}, key=lambda batch: (len(batch), batch))


def _row(record: Record, *, domains: Sequence[str], decode: Sequence[str], prefill: Sequence[str]) -> Row:
    failures = list(record.failures)
    quality, memory, speed = (
        _finite_quality(record.quality, failures),
        record.memory,
        _finite_speed(record.speed, failures),
    )
    decode_over_fp16 = speed.decode_over_fp16 if speed else {}
    return Row(
        variant=record.variant,
        description=record.description,
        artifact=record.artifact,
        artifact_sha256=record.artifact_sha256,
        accuracy_loss_percent=quality.accuracy_loss_percent if quality else None,
        memory_percent_of_fp16=_memory_percent(memory),
        speed_over_fp16=decode_over_fp16.get("1"),
        perplexity=quality.perplexity if quality else None,
        perplexity_change_percent=quality.perplexity_change_percent if quality else None,
        kl_to_baseline=quality.kl_to_baseline if quality else None,
        top1_agreement=quality.top1_agreement if quality else None,
        bits_per_byte=quality.bits_per_byte if quality else None,
        next_token_accuracy=quality.next_token_accuracy if quality else None,
        compute_dtype=quality.compute_dtype if quality else None,
        domains={name: quality.domains.get(name) if quality else None for name in domains},
        weights_bytes=memory.weights_bytes if memory else None,
        fp16_weights_bytes=memory.fp16_weights_bytes if memory else None,
        quantized_weights_percent_of_fp16=memory.quantized_weights_percent_of_fp16 if memory else None,
        artifact_bytes=memory.artifact_bytes if memory else None,
        peak_memory_bytes=memory.peak_memory_bytes if memory else None,
        load_seconds=memory.load_seconds.value if memory else None,
        load_seconds_interval=memory.load_seconds if memory else None,
        decode_tokens_per_second={
            batch: speed.decode_tokens_per_second.get(batch) if speed else None for batch in decode
        },
        prefill_tokens_per_second={
            batch: speed.prefill_tokens_per_second.get(batch) if speed else None for batch in prefill
        },
        decode_over_fp16={batch: decode_over_fp16.get(batch) for batch in decode},
        prefill_over_fp16={batch: speed.prefill_over_fp16.get(batch) if speed else None for batch in prefill},
        twin=speed.twin if speed else None,
        layout=speed.layout if speed else None,
        failures=tuple(failures),
        versions=record.versions,
        tokens_per_expert=record.tokens_per_expert,
    )


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
