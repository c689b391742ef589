"""The verdicts of other engines as text, for every kind of table."""

from dataclasses import dataclass
from typing import Final

from quantlab.evaluation.engines.verdict import EngineVerdict
from quantlab.evaluation.metric import Unit
from quantlab.report.matrix.matrix import Matrix
from quantlab.report.matrix.rows import Row
from quantlab.report.matrix.table_cells import human_bytes, interval, number

TITLE: Final = "Judged by other engines"
HEADING: Final = "engines"
"""Head of the column of verdicts."""
MEANING: Final = (
    "Verdicts of other programs that loaded the artifact and computed the same tokens as quantlab's runtime. agrees: the same "
    "within the stated criterion; differs: something else; refuses: it does not load or run the artifact; not here: the machine "
    "cannot tell."
)
NUMBERS: Final = (
    "Δ nll, nats",
    "rms, nats",
    "rms of the source, nats",
    "top-1 %",
    "greedy %",
    "peak memory",
    "prefill, tok/s",
    "decode, tok/s",
)
"""Heads of the numbers of a verdict."""
_MOST_NAMES: Final = 3


@dataclass(frozen=True)
class EngineLine:
    """One verdict: a variant, an engine with its version and the format, the verdict, and facts in words."""

    variant: str
    engine: str
    verdict: str
    mood: str
    """ "good", "bad" or "unclear"."""
    reason: str
    numbers: tuple[str, ...]
    """Texts under the heads after the verdict."""
    details: tuple[str, ...]
    """Sentences: criterion, schemes, names, versions."""


@dataclass(frozen=True)
class EngineTable:
    title: str
    heads: tuple[str, ...]
    lines: tuple[EngineLine, ...]
    note: str


def engine_table(matrix: Matrix) -> EngineTable | None:
    """The table of a matrix; None if no engine judged any of its artifacts."""
    lines = tuple(engine_line(row, found) for row in matrix.rows for found in row.record.engines)
    if not lines:
        return None
    return EngineTable(TITLE, ("variant", "engine", "verdict", *NUMBERS), lines, MEANING)


def has_verdicts(matrix: Matrix) -> bool:
    """Whether an engine judged any artifact, so that tables have the column."""
    return any(row.record.engines for row in matrix.rows)


def verdicts_of(row: Row) -> str:
    """The verdicts on a row in a few words: "transformers: agrees, vllm: not here"; empty if there are none."""
    return ", ".join(f"{_name(found)}: {found.verdict}" for found in row.record.engines)


def engine_line(row: Row, found: EngineVerdict) -> EngineLine:
    """One verdict as text."""
    mean = found.nll_difference
    numbers = (
        "–" if mean is None else f"{_small(mean.value)} ({interval(mean, 'nats')})",
        _small(found.nll_rms),
        _small(found.source_nll_rms),
        _or_dash(found.top1_agreement, "share"),
        _or_dash(found.greedy_agreement, "share"),
        "–" if found.peak_memory_bytes is None else human_bytes(found.peak_memory_bytes),
        _or_dash(found.prefill_tokens_per_second, "rate"),
        _or_dash(found.decode_tokens_per_second, "rate"),
    )
    engine = f"{_name(found)} {found.version}".strip()
    mood = {"agrees": "good", "not here": "unclear"}.get(found.verdict, "bad")
    return EngineLine(row.variant, engine, found.verdict, mood, found.reason, numbers, tuple(_details(found)))


def _details(found: EngineVerdict) -> list[str]:
    """What the numbers of a verdict do not say."""
    modules = "; ".join(
        f"{one.count} {one.module}: {one.scheme or 'not quantized'}"
        + (f", {one.kernel}" if one.kernel else "")
        + (f", in {one.dtype}" if one.dtype else "")
        for one in found.modules
    )
    layers = "; ".join(
        f"{one.module} differs by {_small(one.difference)}" + (f" ({one.rule})" if one.rule else "")
        for one in found.layers
    )
    versions = ", ".join(f"{name} {version}" for name, version in sorted(found.versions.items()))
    about = f"{found.tokens:,} tokens, {found.text}, in {found.dtype}" if found.tokens else ""
    told = (
        ("criterion", found.criterion),
        ("text", about),
        ("source", found.source_note),
        ("weights", found.weights),
        ("modules", modules),
        ("single modules", layers),
        ("left unquantized against the plan", _names(found.left_unquantized or ())),
        ("without a tensor", _names(found.missing)),
        ("tensors not used", _names(found.unexpected)),
        ("rounded on loading", _names(found.rounded)),
        ("computed by plain torch instead of the engine", _names(found.replaced)),
        ("notes", "; ".join(found.notes)),
        ("hardware", found.hardware),
        ("versions", versions),
    )
    return [f"{name}: {text}" for name, text in told if text]


def _name(found: EngineVerdict) -> str:
    plain = found.format in ("compressed-tensors", "fp8") or (found.format == "dense" and not found.export_sha256)
    return found.engine if plain else f"{found.engine} on {found.format}"


def _names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _small(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}".replace("e-0", "e-").replace("-", "−")


def _or_dash(value: float | None, unit: Unit) -> str:
    return "–" if value is None else number(value, unit)
