"""The columns of a table: the fixed ones, and those that follow from batch sizes, tasks and machines."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from quantlab.evaluation.record import Measured, TaskKey, TaskResult
from quantlab.report.matrix.column import Column, Phase, Unit
from quantlab.report.matrix.fixed_columns import (
    DETAILS_COLUMNS,
    DIVERGENCE_COLUMNS,
    HEADLINE_COLUMNS,
    KV_CACHE,
    TWIN_MEMORY,
)
from quantlab.report.matrix.matrix import Matrix
from quantlab.report.matrix.rows import Row, task_labels, task_of


def columns(matrix: Matrix) -> tuple[Column, ...]:
    """All columns behind the variant's name: the three that decide first, then the details."""
    return columns_of(matrix.rows)


def columns_of(rows: Sequence[Row]) -> tuple[Column, ...]:
    """All columns that these rows need; columns of speed stand apart for every machine."""
    first = rows[0]
    decode = _measured_batches([row.decode_tokens_per_second for row in rows])
    prefill = _measured_batches([row.prefill_tokens_per_second for row in rows])
    found = (
        *HEADLINE_COLUMNS,
        *DETAILS_COLUMNS,
        *(DIVERGENCE_COLUMNS if any(row.divergence for row in rows) else ()),
        *_domain_columns(rows),
        *_task_columns(rows),
        *((KV_CACHE,) if any(row.kv_cache_bytes_per_token is not None for row in rows) else ()),
        *((TWIN_MEMORY,) if any(row.twin_memory_percent_of_fp16 is not None for row in rows) else ()),
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


def _domain_columns(rows: Sequence[Row]) -> Iterator[Column]:
    """For every kind of text its perplexity, the change of it and KL, where there are several kinds."""
    domains = list(rows[0].domains)
    for name in domains if len(domains) > 1 else ():
        yield _domain_column("perplexity", name, "perplexity", "Perplexity", unit="plain", relative=False)
        yield _domain_column(
            "perplexity_change_percent", name, "change %", "Change of perplexity against the baseline", unit="change"
        )
        yield _domain_column("kl_to_baseline", name, "KL, nats", "Mean KL divergence from the baseline", unit="nats")


def _domain_column(field: str, name: str, head: str, meaning: str, *, unit: Unit, relative: bool = True) -> Column:
    def read(row: Row) -> Measured | None:
        domain = row.domains[name]
        found: Measured | None = getattr(domain, field) if domain else None
        return found

    return Column(
        key=f"{field}_on.{name}",
        field=f"quality.domains.{name}.{field}",
        heading=f"{name}: {head}",
        meaning=f"{meaning} on held-out text of the kind {name}.",
        group="domains",
        unit=unit,
        read=read,
        better="low",
        relative=relative,
    )


def _task_columns(rows: Sequence[Row]) -> Iterator[Column]:
    """For every task its loss and its score, in the order of the suite."""
    tasks = {task.key: task for row in rows for task in row.tasks}
    for key, name in task_labels(tasks.values()).items():
        yield from _columns_of_task(tasks[key], key, name)


def _columns_of_task(task: TaskResult, key: TaskKey, name: str) -> tuple[Column, Column]:
    def loss(row: Row) -> Measured | None:
        found = task_of(row, key)
        return found.loss if found else None

    def score(row: Row) -> Measured | None:
        found = task_of(row, key)
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
            task=key,
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
            task=key,
        ),
    )
