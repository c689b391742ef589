"""The columns of the tables: what they are called, what their heads mean, and where their numbers stand in a record."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from quantlab.evaluation.record import Divergence, Measured, TaskResult
from quantlab.report.matrix import Matrix
from quantlab.report.rows import Row

Unit = Literal[
    "percent", "change", "ratio", "plain", "nats", "share", "points", "bytes", "seconds", "milliseconds", "rate"
]
Group = Literal["quality", "tasks", "memory", "speed"]
Phase = Literal["decode", "prefill"]
Need = Literal["suite", "baseline", "hardware"]

HEADLINE = ("accuracy_loss_percent", "memory_percent_of_fp16", "speed_over_fp16")
"""The columns that decide."""


@dataclass(frozen=True)
class Column:
    """One column of the tables."""

    key: str
    """Name in matrix.json, with the batch size or task behind a dot."""
    field: str
    """Where the number stands in a record."""
    heading: str
    meaning: str
    """One sentence for people."""
    group: Group
    unit: Unit
    read: Callable[[Row], Measured | float | None]
    better: Literal["low", "high"]
    relative: bool = False
    """Compares with the baseline, so the baseline itself has none."""
    of_machine: bool = False
    """Depends on the hardware it was measured on."""

    @property
    def needs(self) -> tuple[Need, ...]:
        """What two records must share for their numbers to be comparable."""
        needs: list[Need] = [] if self.group == "memory" else ["suite"]
        if self.relative:
            needs.append("baseline")
        if self.group == "speed" or self.of_machine:
            needs.append("hardware")
        return tuple(needs)


def columns(matrix: Matrix) -> tuple[Column, ...]:
    """All columns behind the variant's name: the three that decide first, then the details."""
    return columns_of(matrix.rows)


def columns_of(rows: Sequence[Row]) -> tuple[Column, ...]:
    """All columns that these rows need; columns of speed stand apart for every machine."""
    first = rows[0]
    decode = _measured_batches([row.decode_tokens_per_second for row in rows])
    prefill = _measured_batches([row.prefill_tokens_per_second for row in rows])
    found = (
        *_HEADLINE,
        *_DETAILS,
        *(_DIVERGENCE if any(row.divergence for row in rows) else ()),
        *_task_columns(rows),
        *((_KV_CACHE,) if any(row.kv_cache_bytes_per_token is not None for row in rows) else ()),
        *((_TWIN_MEMORY,) if any(row.twin_memory_percent_of_fp16 is not None for row in rows) else ()),
        *(_rate_column("decode", batch) for batch in decode),
        *(_rate_column("prefill", batch) for batch in prefill),
        *(_ratio_column("decode", batch) for batch in decode if batch != "1"),
        *(_ratio_column("prefill", batch) for batch in prefill),
        *(_first_token_column(batch) for batch in first.time_to_first_token_seconds),
        *(_energy_column(batch) for batch in first.energy_joules_per_token),
    )
    machines = sorted({row.hardware for row in rows})
    if len(machines) < 2:
        return found
    return tuple(apart for column in found for apart in _by_machine(column, machines))


def _by_machine(column: Column, machines: Sequence[str]) -> Iterator[Column]:
    """The column itself, or one for every machine where its numbers depend on the machine."""
    if "hardware" not in column.needs:
        yield column
        return
    for index, machine in enumerate(machines):

        def read(row: Row, *, machine: str = machine) -> Measured | float | None:
            return column.read(row) if row.hardware == machine else None

        key = column.key if index == 0 else f"{column.key}@{machine}"
        yield replace(column, key=key, heading=f"{column.heading} ({machine})", read=read)


def _measured_batches(rates: Sequence[dict[str, Measured | None]]) -> list[str]:
    """Batch sizes that some row has a number for."""
    return [batch for batch in rates[0] if any(rate.get(batch) is not None for rate in rates)]


def _rate_column(phase: Phase, batch: str) -> Column:
    return Column(
        key=f"{phase}_tokens_per_second.{batch}",
        field=f"speed.{phase}_tokens_per_second.{batch}",
        heading=f"{phase} tok/s at {batch}",
        meaning=f"Tokens per second of {phase} at batch size {batch}, all sequences together, measured on a random-weight twin.",
        group="speed",
        unit="rate",
        read=lambda row: (row.decode_tokens_per_second if phase == "decode" else row.prefill_tokens_per_second)[batch],
        better="high",
    )


def _ratio_column(phase: Phase, batch: str) -> Column:
    return Column(
        key=f"{phase}_over_fp16.{batch}",
        field=f"speed.{phase}_over_fp16.{batch}",
        heading=f"{phase} × FP16 at {batch}",
        meaning=f"Speed of {phase} at batch size {batch} over that of FP16, measured on a random-weight twin.",
        group="speed",
        unit="ratio",
        read=lambda row: (row.decode_over_fp16 if phase == "decode" else row.prefill_over_fp16)[batch],
        better="high",
    )


def _first_token_column(batch: str) -> Column:
    return Column(
        key=f"time_to_first_token_seconds.{batch}",
        field=f"speed.time_to_first_token_seconds.{batch}",
        heading=f"first token at {batch}, ms",
        meaning=f"Milliseconds from a prompt to its first new token at batch size {batch}, measured on a random-weight twin.",
        group="speed",
        unit="milliseconds",
        read=lambda row: row.time_to_first_token_seconds[batch],
        better="low",
    )


def _energy_column(batch: str) -> Column:
    return Column(
        key=f"energy_joules_per_token.{batch}",
        field=f"speed.energy_joules_per_token.{batch}",
        heading=f"energy at {batch}, J/token",
        meaning=f"Joules the device reports per decoded token at batch size {batch}, measured on a random-weight twin.",
        group="speed",
        unit="plain",
        read=lambda row: row.energy_joules_per_token[batch],
        better="low",
    )


def task_of(row: Row, name: str) -> TaskResult | None:
    """The result of a task by its name."""
    return next((task for task in row.tasks if task.name == name), None)


def _task_columns(rows: Sequence[Row]) -> Iterator[Column]:
    """For every task its loss and its score, in the order of the suite."""
    for task in {task.name: task for row in rows for task in row.tasks}.values():
        yield from _columns_of_task(task)


def _columns_of_task(task: TaskResult) -> tuple[Column, Column]:
    name = task.name

    def loss(row: Row) -> Measured | None:
        found = task_of(row, name)
        return found.loss if found else None

    def score(row: Row) -> Measured | None:
        found = task_of(row, name)
        return found.score if found else None

    chance = "" if task.random_baseline is None else f"; guessing gets {100 * task.random_baseline:.0f} %"
    told = f"task {name} {task.version}, {task.n:,} items"
    return (
        Column(
            key=f"task_loss.{name}",
            field=f"tasks.{name}.loss",
            heading=f"{name}: loss, points",
            meaning=f"Percentage points of {task.metric} lost against the baseline on the same items; {told}.",
            group="tasks",
            unit="points",
            read=loss,
            better="low",
            relative=True,
        ),
        Column(
            key=f"task_score.{name}",
            field=f"tasks.{name}.score",
            heading=f"{name}: {task.metric} %",
            meaning=f"{task.metric.capitalize()}, {told}{chance}.",
            group="tasks",
            unit="share",
            read=score,
            better="high" if task.higher_is_better else "low",
        ),
    )


def _divergence_column(field: str, heading: str, meaning: str, *, unit: Unit, better: Literal["low", "high"]) -> Column:
    def read(row: Row) -> Measured | None:
        found: Divergence | None = row.divergence
        value = getattr(found, field) if found else None
        return value if isinstance(value, Measured) else None

    return Column(
        key=f"divergence.{field}",
        field=f"quality.divergence.{field}",
        heading=heading,
        meaning=meaning,
        group="quality",
        unit=unit,
        read=read,
        better=better,
        relative=True,
    )


_DIVERGENCE = (
    _divergence_column(
        "kl_median",
        "KL median, nats",
        "Median over tokens of the KL divergence from the baseline.",
        unit="nats",
        better="low",
    ),
    _divergence_column(
        "kl_p99",
        "KL 99th %ile, nats",
        "99th percentile over tokens of the KL divergence from the baseline: the worst of a hundred.",
        unit="nats",
        better="low",
    ),
    _divergence_column(
        "flips_to_wrong",
        "right → wrong %",
        "Tokens that the baseline predicts rightly and the variant wrongly.",
        unit="share",
        better="low",
    ),
    _divergence_column(
        "flips_to_right",
        "wrong → right %",
        "Tokens that the variant predicts rightly and the baseline wrongly.",
        unit="share",
        better="high",
    ),
)

_KV_CACHE = Column(
    key="kv_cache_bytes_per_token",
    field="memory.kv_cache_bytes_per_token",
    heading="cache per token",
    meaning="Bytes by which the runtime's cache grows with every token of a sequence, all layers together.",
    group="memory",
    unit="bytes",
    read=lambda row: row.kv_cache_bytes_per_token,
    better="low",
)

_TWIN_MEMORY = Column(
    key="twin_memory_percent_of_fp16",
    field="speed.twin_memory_percent_of_fp16",
    heading="twin's memory %",
    meaning="Bytes a random-weight twin of real width holds for its weights, in percent of the same weights at two bytes each.",
    group="speed",
    unit="percent",
    read=lambda row: row.twin_memory_percent_of_fp16,
    better="low",
)

_HEADLINE = (
    Column(
        key="accuracy_loss_percent",
        field="quality.accuracy_loss_percent",
        heading="accuracy loss %",
        meaning="Next-token accuracy lost on held-out text, in percent of the baseline's. An interval that reaches zero shows no measurable loss.",
        group="quality",
        unit="change",
        read=lambda row: row.accuracy_loss_percent,
        better="low",
        relative=True,
    ),
    Column(
        key="memory_percent_of_fp16",
        field="memory.weights_bytes",
        heading="memory % of FP16",
        meaning="Bytes the runtime holds for all weights, scales included, in percent of the same weights at two bytes each.",
        group="memory",
        unit="percent",
        read=lambda row: row.memory_percent_of_fp16,
        better="low",
    ),
    Column(
        key="speed_over_fp16",
        field="speed.decode_over_fp16.1",
        heading="speed × FP16",
        meaning="Decode speed at batch size 1 over that of FP16, measured on a random-weight twin in runs interleaved with it.",
        group="speed",
        unit="ratio",
        read=lambda row: row.speed_over_fp16,
        better="high",
    ),
)

_DETAILS = (
    Column(
        key="perplexity_change_percent",
        field="quality.perplexity_change_percent",
        heading="perplexity change %",
        meaning="Change of perplexity against the baseline on the same tokens.",
        group="quality",
        unit="change",
        read=lambda row: row.perplexity_change_percent,
        better="low",
        relative=True,
    ),
    Column(
        key="kl_to_baseline",
        field="quality.kl_to_baseline",
        heading="KL, nats",
        meaning="Mean KL divergence of the predictions from the baseline's, per token, in nats.",
        group="quality",
        unit="nats",
        read=lambda row: row.kl_to_baseline,
        better="low",
        relative=True,
    ),
    Column(
        key="top1_agreement",
        field="quality.top1_agreement",
        heading="top-1 agreement %",
        meaning="Tokens for which baseline and variant hold the same next token most likely.",
        group="quality",
        unit="share",
        read=lambda row: row.top1_agreement,
        better="high",
        relative=True,
    ),
    Column(
        key="perplexity",
        field="quality.perplexity",
        heading="perplexity",
        meaning="Perplexity on held-out text.",
        group="quality",
        unit="plain",
        read=lambda row: row.perplexity,
        better="low",
    ),
    Column(
        key="next_token_accuracy",
        field="quality.next_token_accuracy",
        heading="accuracy %",
        meaning="Tokens whose most likely prediction was right.",
        group="quality",
        unit="share",
        read=lambda row: row.next_token_accuracy,
        better="high",
    ),
    Column(
        key="artifact_bytes",
        field="memory.artifact_bytes",
        heading="size on disk",
        meaning="Size of the artifact's shards, configuration and tokenizer, in powers of 1000.",
        group="memory",
        unit="bytes",
        read=lambda row: row.artifact_bytes,
        better="low",
    ),
    Column(
        key="weights_bytes",
        field="memory.weights_bytes",
        heading="weights",
        meaning="Bytes the runtime holds for weights, scales included.",
        group="memory",
        unit="bytes",
        read=lambda row: row.weights_bytes,
        better="low",
    ),
    Column(
        key="quantized_weights_percent_of_fp16",
        field="memory.quantized_weights_percent_of_fp16",
        heading="quantized part %",
        meaning="The same as memory % of FP16, of the quantized tensors only.",
        group="memory",
        unit="percent",
        read=lambda row: row.quantized_weights_percent_of_fp16,
        better="low",
    ),
    Column(
        key="peak_memory_bytes",
        field="memory.peak_memory_bytes",
        heading="peak memory",
        meaning="Largest resident size of a process that loads the artifact and reads one window of text, libraries included.",
        group="memory",
        unit="bytes",
        read=lambda row: row.peak_memory_bytes,
        better="low",
        of_machine=True,
    ),
    Column(
        key="load_seconds",
        field="memory.load_seconds",
        heading="load, s",
        meaning="Seconds until the artifact is ready to compute.",
        group="memory",
        unit="seconds",
        read=lambda row: row.load_seconds_interval,
        better="low",
        of_machine=True,
    ),
)
