"""Terminal output: tables of plans and checkpoints, progress bars, errors."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from quantlab.errors import QuantlabError
from quantlab.evaluation.engines.verdict import EngineVerdict
from quantlab.formats.engine_rules.rule import Verdict
from quantlab.plan.model import Outcome, Plan, VariantPlan
from quantlab.plan.source import SourceWeight
from quantlab.recipe.presets import Preset


def size(count: float) -> str:
    """Bytes as text with a decimal prefix (powers of 1000), for example 31.4 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def progress_bars(console: Console, *, quiet: bool) -> Progress:
    """Progress bars with elapsed and remaining time."""
    columns = (
        TextColumn("{task.description}", style="bold"),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[detail]}", style="dim"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
    )
    return Progress(*columns, console=console, disable=quiet, transient=False)


class StageBars:
    """Shows one progress bar per named stage: `bars(stage, done, total)`."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total or None, detail="")
        self._bars.update(self._tasks[stage], completed=done, total=total or None)


def print_artifacts(
    console: Console, *, made: Sequence[str], outdated: Sequence[str], kept: Sequence[str], directory: Path
) -> None:
    """Print how many artifacts were made and kept, and which were made again because code or libraries changed."""
    words = [f"{len(names)} artifacts {what}" for names, what in ((made, "made"), (kept, "kept")) if names]
    console.print(f"{', '.join(words)} in {directory}/artifacts", style="dim", highlight=False, markup=False)
    if outdated:
        text = f"made again, because the code or a library has changed: {', '.join(outdated)}"
        console.print(text, style="dim", highlight=False, markup=False)


def print_export(console: Console, directory: Path, notes: Sequence[str], *, made: bool) -> None:
    """Print the path of an export, and what its writer noted."""
    console.print(f"{directory} {'written' if made else 'kept'}", style="dim", highlight=False, markup=False)
    for note in notes:
        console.print(f"  {note}", style="dim", highlight=False, markup=False)


def print_check(console: Console, name: str, verdict: str, detail: str) -> None:
    """Print the result of one check of `verify`."""
    style = {"ok": "green", "failed": "bold red"}.get(verdict, "yellow")
    console.print(Text.assemble((f"{verdict:<15}", style), name, (f": {detail}", "dim")), soft_wrap=True)


def print_verdict(console: Console, verdict: EngineVerdict) -> None:
    """Print the verdict of one engine, its reason and its numbers."""
    style = {"agrees": "green", "not here": "yellow"}.get(verdict.verdict, "bold red")
    name = f"{verdict.engine} {verdict.version}".strip() + f" on {verdict.format}"
    console.print(
        Text.assemble((f"{verdict.verdict:<15}", style), name, (verdict.reason and f": {verdict.reason}", "dim")),
        soft_wrap=True,
    )
    numbers = [
        f"rms {verdict.nll_rms:.2g} nats" if verdict.nll_rms is not None else "",
        f"median {verdict.nll_median:.2g}" if verdict.nll_median is not None else "",
        f"source {verdict.source_nll_rms:.2g}" if verdict.source_nll_rms is not None else "",
        f"top-1 {100 * verdict.top1_agreement:.2f} %" if verdict.top1_agreement is not None else "",
        f"greedy {100 * verdict.greedy_agreement:.1f} %" if verdict.greedy_agreement is not None else "",
        f"{verdict.tokens:,} tokens" if verdict.tokens else "",
    ]
    words = (
        verdict.source_note and f"source: {verdict.source_note}",
        verdict.weights and f"weights: {verdict.weights}",
        verdict.criterion and f"criterion: {verdict.criterion}",
    )
    for text in (", ".join(filter(None, numbers)), *words):
        if text:
            console.print(Text(" " * 15 + text, style="dim"), soft_wrap=True)


def engines_table(rows: Iterable[tuple[str, str, str, str]]) -> Table:
    """The engines: name, pinned version, where its Python was found, formats."""
    table = Table("engine", "version pinned", "Python", "reads")
    for row in rows:
        table.add_row(*row)
    return table


def print_presets(console: Console, presets: Mapping[str, Preset]) -> None:
    """Print the datasets with short names: what they hold, and where they are on the hub."""
    for name, one in presets.items():
        place = ", ".join(part for part in (one.dataset, one.config, f"split {one.split}") if part)
        console.print(Text.assemble((f"{name:<14}", "bold"), one.about), soft_wrap=True)
        console.print(Text(f"{'':<14}{place}, commit {one.revision[:12]}", style="dim"), soft_wrap=True)


def print_error(console: Console, error: QuantlabError) -> None:
    """Print an error in red, with its details below."""
    console.print(Text("error: ", style="bold red") + Text(error.what, style="bold"), soft_wrap=True)
    for label, text in (("where", error.where), ("found", error.found), ("fix", error.fix)):
        if text:
            console.print(Text(f"  {label + ':':<7}", style="dim") + Text(text), soft_wrap=True)


def checkpoint_table(weights: Iterable[SourceWeight]) -> Table:
    """Roles, dtypes, tensors, parameters and bytes of a checkpoint."""
    return contents_table(
        (
            weight.tensor.role,
            weight.entry.dtype,
            weight.entry.elements,
            weight.entry.nbytes + (weight.scale.nbytes if weight.scale else 0),
        )
        for weight in weights
    )


def contents_table(weights: Iterable[tuple[str, str, int, int]]) -> Table:
    """Totals by role and number format.

    Args:
        weights: role, number format, parameters and bytes of each weight.
    """
    rows: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for role, numbers, parameters, nbytes in weights:
        row = rows[role, numbers]
        row[0] += 1
        row[1] += parameters
        row[2] += nbytes
    total = sum(row[2] for row in rows.values())
    table = Table(title="Contents of the checkpoint", title_justify="left")
    table.add_column("role")
    table.add_column("dtype")
    for head in ("tensors", "parameters", "bytes", "share"):
        table.add_column(head, justify="right")
    for (role, dtype), (tensors, parameters, nbytes) in sorted(rows.items(), key=lambda item: -item[1][2]):
        table.add_row(role, dtype, f"{tensors:,}", f"{parameters:,}", size(nbytes), f"{100 * nbytes / total:.1f} %")
    table.add_section()
    sums = [sum(row[index] for row in rows.values()) for index in range(2)]
    table.add_row("all", "", f"{sums[0]:,}", f"{sums[1]:,}", size(total), "100 %")
    return table


def fp16_bytes(plan: Plan) -> int:
    """Bytes of the checkpoint's parameters at two bytes each, without the scales of FP8 weights."""
    return sum(2 * step.source.elements for step in plan.variants[0].steps)


def plan_table(plan: Plan) -> Table:
    """One row per variant: its passes, artifact size, peak memory and tensor-parallel sizes."""
    table = Table(title="The plan", title_justify="left")
    table.add_column("variant", style="bold", no_wrap=True)
    table.add_column("passes")
    for head in ("artifact", "% of FP16", "peak memory", "tensor parallel"):
        table.add_column(head, justify="right")
    whole = fp16_bytes(plan)
    for variant in plan.variants:
        table.add_row(
            variant.name,
            variant.description,
            size(variant.artifact_bytes),
            f"{100 * variant.artifact_bytes / whole:.1f}",
            size(variant.peak_memory_bytes),
            "/".join(map(str, variant.tensor_parallel)),
        )
    return table


def rules_table(plan: Plan) -> Table:
    """What the rules of engines say about every variant; engines of which they say the same share a row."""
    table = Table(title="Engines, by their rules: read in their sources, not run", title_justify="left")
    table.add_column("variant", style="bold", no_wrap=True)
    table.add_column("engine")
    table.add_column("verdict")
    for variant in plan.variants:
        engines: dict[str, list[str]] = defaultdict(list)
        for verdict in variant.engines:
            engines[verdict.text].append(verdict.engine.label)
        for index, (text, labels) in enumerate(engines.items()):
            table.add_row("" if index else variant.name, Text(", ".join(labels)), Text(text))
        table.add_section()
    return table


def outcome_table(plan: Plan) -> Table:
    """Source tensors by outcome, one row per variant."""
    table = Table(title="Tensors by outcome", title_justify="left")
    table.add_column("variant", style="bold", no_wrap=True)
    outcomes = get_args(Outcome)
    for outcome in outcomes:
        table.add_column(outcome, justify="right")
    for variant in plan.variants:
        counts = ledger_counts(variant)
        table.add_row(variant.name, *(f"{counts[outcome]:,}" if outcome in counts else "–" for outcome in outcomes))
    return table


def ledger_counts(variant: VariantPlan) -> dict[str, int]:
    """Number of source tensors per outcome."""
    return dict(Counter(entry.outcome for step in variant.steps for entry in step.ledger()).most_common())


def ledger_table(variant: VariantPlan) -> Table:
    """The whole ledger of a variant."""
    table = Table(title=f"Ledger of {variant.name}", title_justify="left")
    for head in ("tensor", "role", "outcome", "reason"):
        table.add_column(head, overflow="fold")
    for step in variant.steps:
        for entry in step.ledger():
            table.add_row(Text(entry.tensor), entry.role, entry.outcome, Text(entry.reason))
    return table


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values, for scripts."""
    return {
        "architecture": plan.architecture.class_name,
        "source_bytes": plan.source_bytes,
        "fp16_bytes": fp16_bytes(plan),
        "variants": [
            {
                "variant": variant.name,
                "description": variant.description,
                "artifact_bytes": variant.artifact_bytes,
                "peak_memory_bytes": variant.peak_memory_bytes,
                "tensor_parallel": list(variant.tensor_parallel),
                "ledger": ledger_counts(variant),
                "shards": sum(len(block.shards) for block in variant.blocks),
                "engines": [verdict_json(verdict) for verdict in variant.engines],
                "notes": list(variant.notes),
                "exports": list(variant.exports),
            }
            for variant in plan.variants
        ],
        "peers": [
            {
                "peer": peer.name,
                "description": peer.description,
                "directory": str(peer.checkpoint.directory),
                "method": peer.method,
                "producer": peer.producer,
            }
            for peer in plan.peers
        ],
    }


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """What the rules of an engine say, as JSON values."""
    engine = verdict.engine
    return {
        "engine": engine.name,
        "version": engine.version,
        "run": False,
        "reads_method": verdict.reads_method,
        "prevented": verdict.prevented,
        "verdict": verdict.text,
        "objections": [
            {
                "rule": one.rule.name,
                "kind": one.rule.kind,
                "text": one.rule.text,
                "where": one.finding.subject,
                "found": one.finding.found,
                "seen": one.rule.seen,
                "source": {
                    "repository": engine.repository,
                    "file": one.rule.file,
                    "version": one.rule.version or engine.version,
                },
            }
            for one in verdict.objections
        ],
    }
