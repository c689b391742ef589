"""The model card (README.md) of an artifact: contents, changes, loading instructions and limits."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from statistics import median
from typing import Any

from quantlab.passes.apply import WeightReport
from quantlab.plan.model import Plan, Step, VariantPlan
from quantlab.recipe.algorithms import Awq, Gptq, PruneAlgorithm, QuantizeAlgorithm, Rtn, SparseGpt, Wanda
from quantlab.recipe.load import LoadedRecipe
from quantlab.run.card_metadata import front_matter

CARD_NAME = "README.md"
MEASURED_START, MEASURED_END = "<!-- measured by quantlab -->", "<!-- end of what was measured -->"
"""Reports write the variant's measured numbers between these two lines; the run writes the rest of the card."""
_WORST = 10


def model_card(
    plan: Plan,
    variant: VariantPlan,
    recipe: LoadedRecipe,
    reports: Mapping[str, WeightReport],
    coverage: Mapping[str, Sequence[int]],
    *,
    calibrated_on: str,
    text: Mapping[str, Any],
) -> str:
    """The model card as Markdown.

    Args:
        plan: the compiled recipe.
        variant: the plan of the artifact.
        recipe: the recipe file.
        reports: reports on the changed weights, by name.
        coverage: calibration tokens per routed expert, by block.
        calibrated_on: device and dtype of calibration; empty without calibration.
        text: what the calibration drew from datasets, as in the manifest: `sources`, and `covered` if the recipe asks for coverage.
    """
    sources = text.get("sources", ())
    sections = [
        front_matter(plan, variant, recipe),
        f"# {variant.name}: {variant.description}\n",
        f"Made by quantlab from `{recipe.recipe.model}` ({plan.architecture.class_name}) with the recipe `{recipe.name}` (below). "
        "`manifest.json` contains the hash of every file except this one, and the outcome of every tensor.\n",
        f"## Measurements\n\n{MEASURED_START}\nNot measured yet.\n{MEASURED_END}\n",
        _roles_table(variant),
        _calibration_section(variant, coverage, calibrated_on, sum(one["samples"] for one in sources)),
        _sources_section(sources),
        _covered_section(text.get("covered")),
        _errors_section(reports),
        _loading_section(variant),
        _engines_section(variant),
    ]
    limits = [
        "The artifact inherits the licence and the limitations of the source model.",
        "The measurements are valid for the text, tasks and hardware they were made with.",
        *variant.notes,
    ]
    sections.append("## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits) + "\n")
    sections.append(f"## Recipe\n\n~~~yaml\n{recipe.content.decode().rstrip()}\n~~~\n")
    return "\n".join(section for section in sections if section)


def _quantized(variant: VariantPlan) -> list[Step]:
    return [step for step in variant.steps if step.quantize is not None]


def _roles_table(variant: VariantPlan) -> str:
    groups: dict[tuple[str, str], list[Step]] = defaultdict(list)
    for step in variant.steps:
        stored = step.outputs[0][1] if step.outputs else "nothing"
        groups[step.tensor.role, step.quantize.quantize if step.quantize else stored].append(step)
    rows = [
        f"| {role} | {what} | {len(steps)} | {sum(step.source_bytes for step in steps) / 1e6:,.2f} | {sum(step.output_bytes for step in steps) / 1e6:,.2f} |"
        for (role, what), steps in groups.items()
    ]
    return "\n".join(
        [
            "## Stored tensors\n",
            "| role | stored as | tensors | source MB | MB |",
            "|---|---|--:|--:|--:|",
            *rows,
            f"| all | | {sum(map(len, groups.values()))} | | {variant.artifact_bytes / 1e6:,.2f} |\n",
        ]
    )


def _calibration_section(
    variant: VariantPlan, coverage: Mapping[str, Sequence[int]], calibrated_on: str, drawn: int
) -> str:
    calibration = variant.calibration
    if calibration is None:
        return ""
    samples = drawn or calibration.samples
    tokens = samples * calibration.length
    lines = [
        "## Calibration\n",
        f"{samples} samples of {calibration.length} tokens ({tokens:,} in all), seed {calibration.seed}; the next block reads "
        f"the outputs of the {'changed blocks' if calibration.propagate == 'quantized' else 'unchanged model'}. "
        f"Computed on {calibrated_on}.\n",
    ]
    if coverage:
        lines += [
            "Calibration tokens that the model's router sent to each expert. An expert with fewer tokens than input channels is called "
            f"starved{_shrinkage_note(variant)}.\n",
            "| layer | fewest | median | most | starved |",
            "|---|--:|--:|--:|--:|",
            *(
                f"| {block.removeprefix('layer ')} | {min(counts):,} | {median(counts):,.0f} | {max(counts):,} | {_starved(variant, block, counts)} |"
                for block, counts in coverage.items()
            ),
            "",
        ]
    return "\n".join(lines)


def _sources_section(sources: Sequence[Mapping[str, Any]]) -> str:
    if not sources:
        return ""
    rows = [
        f"| {' '.join(filter(None, (one['dataset'], one['config'], one['split'])))} | {one['commit'][:12]} | {one['documents']:,} "
        f"| {one['samples']:,} | {one['tokens']:,} |"
        for one in sources
    ]
    head = ["| calibration text | commit or sha256 | documents | samples | tokens |", "|---|---|--:|--:|--:|"]
    return "\n".join([*head, *rows, ""])


def _covered_section(covered: Mapping[str, Any] | None) -> str:
    """Whether every expert has the tokens that the recipe asks for."""
    if covered is None:
        return ""
    few = sum(map(len, covered["uncovered"].values()))
    reached = (
        "every routed expert has them"
        if not few
        else f"{few} experts have fewer ({covered['ended']}): "
        + "; ".join(f"{block}: {', '.join(experts)}" for block, experts in covered["uncovered"].items())
    )
    return f"Samples were added until every routed expert had {covered['wanted']} tokens of the unchanged model: {reached}.\n"


def _shrinkage_note(variant: VariantPlan) -> str:
    """How experts with few tokens are treated; empty if not specially."""
    changes = [change for step in variant.steps if step.tensor.expert is not None for change in step.passes]
    shrunk = any(_shrinks(change.algorithm) for change in changes)
    return "; the fewer tokens it has, the more its statistics are shrunk towards those of all tokens" if shrunk else ""


def _shrinks(algorithm: QuantizeAlgorithm | PruneAlgorithm) -> bool:
    match algorithm:
        case Gptq(shrinkage=shrinkage):
            return shrinkage > 0
        case Rtn(clip=clip) | Awq(clip=clip):
            return clip == "activations"
        case _:
            return isinstance(algorithm, Wanda | SparseGpt)


def _starved(variant: VariantPlan, block: str, counts: Sequence[int]) -> int:
    inputs = max(
        step.source.shape[1]
        for step in variant.steps
        if step.tensor.block == block and step.tensor.role == "routed_experts" and len(step.source.shape) == 2
    )
    return sum(count < inputs for count in counts)


def _errors_section(reports: Mapping[str, WeightReport]) -> str:
    if not reports:
        return ""
    errors = [report.relative_error for report in reports.values()]
    lines = [
        "## Errors of the changed weights\n",
        f"Relative error of the changed weights (Frobenius norm of the change over that of the weight): median {median(errors):.4f} over "
        f"{len(errors)} matrices.",
    ]
    outputs = {name: report.output_error for name, report in reports.items() if report.output_error is not None}
    if outputs:
        rounded = [report.rtn_output_error for report in reports.values() if report.rtn_output_error is not None]
        against = f"; plain rounding on the same grid has {median(rounded):.5f}" if rounded else ""
        lines.append(
            f"Relative error of their outputs on the calibration text (squared error over squared output): median {median(outputs.values()):.5f}{against}."
        )
    fallbacks = Counter(report.fallback for report in reports.values() if report.fallback)
    lines += [f"- {count} matrices: {what}" for what, count in sorted(fallbacks.items())]
    lines += _repairs(reports.values())
    worst = sorted(reports, key=lambda name: (-outputs.get(name, 0), -reports[name].relative_error, name))[:_WORST]
    lines += [
        "\nLargest errors:\n",
        "| weight | error of the weight | of its output | of its output with plain rounding | zeros |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in worst:
        report = reports[name]
        output, rounding = (
            "–" if value is None else f"{value:.5f}" for value in (report.output_error, report.rtn_output_error)
        )
        lines.append(
            f"| {name} | {report.relative_error:.4f} | {output} | {rounding} | {100 * report.sparsity:.1f} % |"
        )
    return "\n".join([*lines, ""])


def _repairs(reports: Collection[WeightReport]) -> list[str]:
    """Counts of rows, Hessians and inputs that needed special treatment."""
    damped = [report.damping for report in reports if report.damping is not None]
    dead = [report.dead_columns for report in reports if report.dead_columns]
    kept = [report.kept_rows for report in reports if report.kept_rows]
    lines = []
    if kept:
        lines.append(
            f"- {sum(kept):,} rows in {len(kept)} matrices are rounded to nearest, because their error is smaller"
        )
    if damped:
        lines.append(
            f"- {len(damped)} Hessians needed more damping than the recipe's, up to {max(damped):g} times their mean diagonal"
        )
    if dead:
        lines.append(
            f"- {sum(dead):,} inputs of {len(dead)} matrices were always zero: their weights are rounded to nearest"
        )
    return lines


def _loading_section(variant: VariantPlan) -> str:
    quantized = _quantized(variant)
    packed = any(step.scheme is not None and step.scheme.format.is_integer for step in quantized)
    verdicts = {verdict.engine.name: verdict for verdict in variant.engines}
    lines = ["## Loading\n"]
    if not verdicts["transformers"].prevented:
        computes = (
            " It computes in FP8 on GPUs of compute capability 8.9 and later, and expands FP8 to 16 bits elsewhere."
        )
        lines.append(
            f"- transformers: `AutoModelForCausalLM.from_pretrained(DIR)`.{computes if quantized and not packed else ''}"
        )
    held = (
        "weights stay packed" if packed or not quantized else "FP8 is expanded to bfloat16, activations are not rounded"
    )
    lines.append(f"- quantlab, {held}: `from quantlab.runtime.load import load; model = load(Path(DIR))`.")
    if not verdicts["vllm"].prevented:
        lines.append("- vLLM: `vllm serve DIR`.")
    if not verdicts["sglang"].prevented:
        lines.append("- SGLang: `python -m sglang.launch_server --model-path DIR`.")
    sizes = ", ".join(map(str, variant.tensor_parallel))
    lines.append(f"- Tensor-parallel sizes that leave whole groups in every shard: {sizes or 'none'}.")
    if any(step.tensor.role == "mtp" and step.outputs for step in variant.steps):
        lines.append(
            "- The multi-token-prediction layer is kept in 16 bits; engines use it for speculative decoding, transformers ignores it."
        )
    return "\n".join(lines) + "\n"


def _engines_section(variant: VariantPlan) -> str:
    """What the rules of engines say about the artifact, with the files where they were read."""
    lines = [
        "## Engines\n",
        "What the loaders of engines refuse or misread, by their rules: read in the version named, not run on this artifact. "
        "No objection is no promise.\n",
        "| engine | by its rules, not run | read in |",
        "|---|---|---|",
    ]
    for verdict in variant.engines:
        files = dict.fromkeys(f"`{one.rule.file}`" for one in verdict.objections) if verdict.reads_method else {}
        lines.append(f"| {verdict.engine.label} | {verdict.text} | {', '.join(files)} |")
    return "\n".join(lines) + "\n"
