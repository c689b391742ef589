"""matrix.csv: the matrix for spreadsheets, every number of the page in full.

A measured value has four columns: its name in matrix.json, then the name with `_low`, `_high` and `_n`. Batch size, task, kind of
text or layer are the end of the name: `decode_tokens_per_second_8`.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence

from quantlab.evaluation.measured import Measured
from quantlab.evaluation.record import Attention
from quantlab.report.matrix.columns import columns_of, unlisted_of
from quantlab.report.matrix.engine_table import HEADING, has_verdicts, verdicts_of
from quantlab.report.matrix.layer_maps import LAYER_MEASURES, in_order
from quantlab.report.matrix.matrix import Matrix
from quantlab.report.matrix.row_verdicts import summary
from quantlab.report.matrix.rows import Row, Value, task_labels, task_of

Line = dict[str, str | float | int | None]


def to_csv(matrix: Matrix) -> str:
    """The text of matrix.csv."""
    text = io.StringIO()
    lines = _lines(matrix)
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _lines(matrix: Matrix) -> list[Line]:
    rows = matrix.rows  # every line belongs to one machine: no separate columns
    numbers = [dict(_numbers(row, rows)) for row in rows]
    plain = {name for found in numbers for name, value in found.items() if isinstance(value, int | float)}
    lines: list[Line] = []
    for row, found in zip(rows, numbers, strict=True):
        line: Line = {"variant": row.variant, "artifact": row.record.artifact}
        for name, value in found.items():
            line |= _cells(name, value, plain=name in plain)
        for name, value in _attention(matrix.attention) if matrix.attention else ():
            shown = value if row.variant == matrix.baseline else None
            line |= _cells(name, shown, plain=not isinstance(value, Measured))
        for block in _keys([other.record.tokens_per_expert for other in rows]):
            tokens = " ".join(map(str, row.record.tokens_per_expert.get(block, ())))
            line[_named(f"tokens_of_experts_in {block}")] = tokens
        line |= {
            "verdict": summary(row),
            "noise": "; ".join(f"{key}: {why}" for key, why in row.noise.items()),
            "description": row.description,
            "failures": "; ".join(f"{failure.cell}: {failure.reason}" for failure in row.failures),
        }
        if has_verdicts(matrix):
            line[HEADING] = verdicts_of(row)
        lines.append(line)
    return lines


def _numbers(row: Row, rows: Sequence[Row]) -> Iterator[tuple[str, Value]]:
    """Every number of a row, under names that all rows have."""
    for column in (*columns_of(rows), *unlisted_of(rows)):
        yield column.key, column.read(row)
    for key, label in task_labels(task for other in rows for task in other.tasks).items():
        tasks = [task for other in rows if (task := task_of(other, key))]
        own = task_of(row, key)
        for group in _keys([task.by_group for task in tasks]):
            yield f"task_score.{label} of {group}", own.by_group.get(group) if own else None
    for measure in LAYER_MEASURES:
        own_layers = measure.of(row)
        for layer in _keys([measure.of(other) for other in rows]):
            yield f"{measure.csv_name} {layer}", own_layers.get(layer)
    own_errors = {f"{found.layer} {found.kind}": found for found in row.record.matrix_errors}
    for place in _keys(
        [{f"{found.layer} {found.kind}": found for found in other.record.matrix_errors} for other in rows]
    ):
        for name in ("relative_error", "relative_error_max", "output_error", "output_error_max"):
            yield f"{name} of {place}", getattr(own_errors.get(place), name, None)


def _attention(attention: Attention) -> Iterator[tuple[str, Value]]:
    """Numbers of the baseline's twin."""
    sizes = ("prefill_peak_bytes", "decode_peak_bytes", "cache_bytes")
    for found in attention.cells:
        for name in (*sizes, "prefill_tokens_per_second", "decode_tokens_per_second"):
            yield f"attention {found.implementation} at {found.context} {name}", getattr(found, name)


def _keys(maps: Sequence[Mapping[str, object]]) -> list[str]:
    return in_order({key for found in maps for key in found})


def _cells(name: str, value: Value, *, plain: bool) -> Line:
    name = _named(name)
    if plain:
        return {name: None if isinstance(value, Measured) else value}
    parts = (value.value, value.low, value.high, value.n) if isinstance(value, Measured) else (None,) * 4
    return dict(zip((name, f"{name}_low", f"{name}_high", f"{name}_n"), parts, strict=True))


def _named(name: str) -> str:
    return name.replace(".", "_").replace(" ", "_")
