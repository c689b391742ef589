"""matrix.csv: the matrix for spreadsheets, every number in full.

A measured value takes four columns: the name of matrix.json, then the same with `_low`, `_high` and `_n`. A batch size
is the end of the name: `decode_tokens_per_second_8`.
"""

import csv
import io
from collections.abc import Sequence

from quantlab.evaluation.record import Measured
from quantlab.report.columns import task_of
from quantlab.report.matrix import Matrix
from quantlab.report.rows import Row
from quantlab.report.verdict import summary

_PLAIN = (
    "memory_percent_of_fp16",
    "weights_bytes",
    "fp16_weights_bytes",
    "quantized_weights_percent_of_fp16",
    "artifact_bytes",
    "peak_memory_bytes",
    "kv_cache_bytes_per_token",
    "twin_memory_percent_of_fp16",
)


def to_csv(matrix: Matrix) -> str:
    """The text of matrix.csv."""
    text = io.StringIO()
    lines = [_flat(row, matrix.rows) for row in matrix.rows]
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat(row: Row, rows: Sequence[Row]) -> dict[str, str | float | int | None]:
    flat: dict[str, str | float | int | None] = {"variant": row.variant, "artifact": row.artifact}
    measured: dict[str, Measured | None] = {
        "accuracy_loss_percent": row.accuracy_loss_percent,
        "speed_over_fp16": row.speed_over_fp16,
        "perplexity": row.perplexity,
        "perplexity_change_percent": row.perplexity_change_percent,
        "kl_to_baseline": row.kl_to_baseline,
        "top1_agreement": row.top1_agreement,
        "bits_per_byte": row.bits_per_byte,
        "next_token_accuracy": row.next_token_accuracy,
        "load_seconds": row.load_seconds_interval,
    }
    plain = {name: getattr(row, name) for name in _PLAIN}
    for label, by_batch in (
        ("decode_tokens_per_second", row.decode_tokens_per_second),
        ("prefill_tokens_per_second", row.prefill_tokens_per_second),
        ("decode_over_fp16", row.decode_over_fp16),
        ("prefill_over_fp16", row.prefill_over_fp16),
        ("time_to_first_token_seconds", row.time_to_first_token_seconds),
        ("energy_joules_per_token", row.energy_joules_per_token),
    ):
        measured |= {f"{label}_{batch}": number for batch, number in by_batch.items()}
    flat |= _four("accuracy_loss_percent", measured.pop("accuracy_loss_percent"))
    flat["memory_percent_of_fp16"] = plain.pop("memory_percent_of_fp16")
    for name, number in measured.items():
        flat |= _four(name, number)
    flat |= plain
    for name, domain in row.domains.items():
        flat |= _four(f"perplexity_on_{name}", domain.perplexity if domain else None)
        flat |= _four(f"bits_per_byte_on_{name}", domain.bits_per_byte if domain else None)
    for task in (task for found in rows for task in found.tasks):
        own = task_of(row, task.name)
        flat |= _four(f"task_score_{task.name}", own.score if own else None)
        flat |= _four(f"task_loss_{task.name}", own.loss if own else None)
    layers = {layer for found in rows if found.divergence for layer in found.divergence.layer_errors}
    for layer in sorted(layers, key=lambda name: (len(name), name)):
        error = row.divergence.layer_errors.get(layer) if row.divergence else None
        flat[f"error_of_{layer.replace(' ', '_')}"] = error.value if error else None
    flat |= {
        "verdict": summary(row),
        "noise": "; ".join(f"{key}: {why}" for key, why in row.noise.items()),
        "description": row.description,
        "failures": "; ".join(f"{failure.cell}: {failure.reason}" for failure in row.failures),
    }
    return flat


def _four(name: str, measured: Measured | None) -> dict[str, str | float | int | None]:
    if measured is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None, f"{name}_n": None}
    return {name: measured.value, f"{name}_low": measured.low, f"{name}_high": measured.high, f"{name}_n": measured.n}
