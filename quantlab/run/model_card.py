"""README.md of an artifact: what it is, what changed, how to load it and what not to expect of it."""

from collections import defaultdict
from collections.abc import Mapping
from statistics import median

from quantlab.passes.apply import WeightReport
from quantlab.plan.model import Plan, Step, VariantPlan
from quantlab.recipe.load import LoadedRecipe
from quantlab.recipe.schemes import SCHEMES

_WORST = 10


def model_card(plan: Plan, variant: VariantPlan, recipe: LoadedRecipe, reports: Mapping[str, WeightReport]) -> str:
    """The model card as Markdown."""
    sections = [
        _front_matter(variant),
        f"# {variant.name}: {variant.description}\n",
        f"Made by quantlab from `{recipe.recipe.model}` ({plan.architecture.class_name}) with the recipe `{recipe.name}`, whose text is in "
        "`manifest.json` beside the hash of every file and the outcome of every tensor.\n",
        _roles_table(variant),
        _errors_section(reports),
        _loading_section(variant, plan),
    ]
    if variant.notes:
        sections.append("## Limits\n\n" + "\n".join(f"- {note}" for note in variant.notes) + "\n")
    return "\n".join(section for section in sections if section)


def _front_matter(variant: VariantPlan) -> str:
    tags = ["deepseek", "quantlab", *(["compressed-tensors"] if _quantized(variant) else [])]
    return "---\nlibrary_name: transformers\ntags:\n" + "".join(f"- {tag}\n" for tag in tags) + "---\n"


def _quantized(variant: VariantPlan) -> list[Step]:
    return [step for step in variant.steps if step.quantize is not None]


def _roles_table(variant: VariantPlan) -> str:
    groups: dict[tuple[str, str], list[Step]] = defaultdict(list)
    for step in variant.steps:
        what = step.quantize.quantize if step.quantize else step.outputs[0][1]
        groups[step.claim.role, what].append(step)
    rows = [
        f"| {role} | {what} | {len(steps)} | {sum(step.source_bytes for step in steps) / 1e6:,.2f} | {sum(step.output_bytes for step in steps) / 1e6:,.2f} |"
        for (role, what), steps in groups.items()
    ]
    return "\n".join(
        [
            "## What is stored\n",
            "| role | stored as | tensors | source MB | MB |",
            "|---|---|--:|--:|--:|",
            *rows,
            f"| all | | {sum(map(len, groups.values()))} | | {variant.artifact_bytes / 1e6:,.2f} |\n",
        ]
    )


def _errors_section(reports: Mapping[str, WeightReport]) -> str:
    if not reports:
        return ""
    worst = sorted(reports.items(), key=lambda item: (-item[1].relative_error, item[0]))[:_WORST]
    errors = [report.relative_error for report in reports.values()]
    rows = [f"| {name} | {report.relative_error:.4f} | {100 * report.sparsity:.1f} % |" for name, report in worst]
    return "\n".join(
        [
            "## What it cost\n",
            f"Relative error of the changed weights (Frobenius norm of the change over that of the weight): median {median(errors):.4f} over "
            f"{len(errors)} matrices. The worst:\n",
            "| weight | relative error | zeros |",
            "|---|--:|--:|",
            *rows,
            "",
        ]
    )


def _loading_section(variant: VariantPlan, plan: Plan) -> str:
    quantized = _quantized(variant)
    schemes = {SCHEMES[step.quantize.quantize] for step in quantized if step.quantize}
    int8_experts = any(scheme.quantized_activations for scheme in schemes) and any(
        step.claim.role == "routed_experts" for step in quantized
    )
    lines = ["## How to load it\n"]
    if int8_experts:
        lines.append(
            "- transformers: cannot load int8 experts with quantized activations (5.x); use vLLM, SGLang or quantlab's runtime."
        )
    else:
        expands = " It expands packed weights to 16 bits: neither memory nor time is saved there." if quantized else ""
        lines.append(f"- transformers: `AutoModelForCausalLM.from_pretrained(DIR)`.{expands}")
    lines.append("- quantlab, weights stay packed: `from quantlab.runtime.load import load; model = load(Path(DIR))`.")
    sizes = ", ".join(map(str, variant.tensor_parallel))
    lines.append(
        f"- vLLM: `vllm serve DIR`; SGLang: `python -m sglang.launch_server --model-path DIR`. Tensor parallel sizes that divide its groups: {sizes}."
    )
    if any(step.claim.role == "mtp" for step in variant.steps):
        lines.append(
            "- The multi-token-prediction layer is carried through in 16 bits; engines use it for speculative decoding, transformers ignores it."
        )
    return "\n".join(lines) + "\n"
