"""Requirements of serving engines on a quantized checkpoint, checked on the plan.

vLLM or SGLang enforce each of these rules at load time, which would be hours later. What single engines refuse or misread
stands in `quantlab.formats.engine_rules`; here is what refuses a recipe, and what all engines share.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from quantlab.errors import PlanError
from quantlab.formats.contents import Contents
from quantlab.formats.engine_rules.table import RULES
from quantlab.formats.layouts import method_of_layout
from quantlab.plan.model import Step
from quantlab.recipe.schema import Prune
from quantlab.recipe.schemes import SCHEMES, Scheme

_TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)


def check_serving_rules(steps: Sequence[Step], contents: Contents, *, variant: str) -> None:
    """Check that engines can serve the planned artifact.

    Args:
        steps: the steps that store something.
        contents: what they store.
        variant: its name.

    Raises:
        PlanError: a group or an n:m pattern does not divide a matrix, or matrices that engines fuse have different
            schemes.
    """
    for step in steps:
        scheme = step.scheme
        if scheme is not None and step.source.shape[1] % scheme.format.divisor:
            raise _indivisible(step, scheme, variant)
        for change in step.passes:
            pattern = change.pattern if isinstance(change, Prune) else None
            if pattern is not None and step.source.shape[1] % pattern.of:
                raise PlanError(
                    "the pattern does not divide a matrix",
                    where=f"variant {variant}, {step.tensor.name}",
                    found=f"{step.source.shape[1]} columns in {pattern.of}s ({pattern})",
                    fix=f"leave it alone with `ignore: [{step.tensor.name.removesuffix('.weight')}]`, or prune a share",
                )
    _check_methods(steps, variant=variant)
    _check_blocking_rules(contents, variant=variant)


def tensor_parallel_sizes(steps: Iterable[Step], *, heads: int) -> tuple[int, ...]:
    """Tensor-parallel sizes that divide the attention heads and leave whole groups in every quantized linear."""
    sizes = [size for size in _TENSOR_PARALLEL_SIZES if heads % size == 0]
    for step in steps:
        scheme, rule = step.scheme, step.tensor.rule
        if scheme is None or rule is None:
            continue
        axis = 1 if rule.splits == "columns" else 0
        length, whole = step.source.shape[axis], scheme.format.shard[axis]
        sizes = [size for size in sizes if length % (size * whole) == 0]
    return tuple(sizes)


def serving_notes(steps: Sequence[Step]) -> tuple[str, ...]:
    """Notes on limits that all engines share and that do not make the plan invalid."""
    notes = []
    patterns = {
        str(change.pattern or "unstructured") for step in steps for change in step.passes if isinstance(change, Prune)
    }
    for pattern in sorted(patterns):
        notes.append(
            f"the zeros of {pattern} pruning are stored like any other weight: no engine that loads this artifact saves memory or time from them"
        )
    return tuple(notes)


def _indivisible(step: Step, scheme: Scheme, variant: str) -> PlanError:
    columns = step.source.shape[1]
    smaller = [
        other.name
        for other in SCHEMES.values()
        if replace(other.format, granularity=scheme.format.granularity) == scheme.format
        and other.format.group_size
        and columns % other.format.group_size == 0
    ]
    module = step.tensor.name.removesuffix(".weight")
    use = f"use {smaller[0]}, or " if smaller else ""
    return PlanError(
        "the group does not divide a matrix",
        where=f"variant {variant}, {step.tensor.name}",
        found=f"{columns} columns in groups of {scheme.format.divisor} ({scheme.name})",
        fix=f"{use}leave it alone with `ignore: [{module}]`",
    )


def _check_methods(steps: Sequence[Step], *, variant: str) -> None:
    """Refuse schemes of several quantization methods: config.json describes only one."""
    methods = {method_of_layout(step.layout).word: step.scheme.name for step in steps if step.scheme is not None}
    if len(methods) > 1:
        raise PlanError(
            "the schemes of a variant need different quantization methods, and config.json can describe only one",
            where=f"variant {variant}",
            found=", ".join(f"{scheme} ({method})" for method, scheme in methods.items()),
            fix="write one variant per method",
        )


def _check_blocking_rules(contents: Contents, *, variant: str) -> None:
    """Refuse what the rules of engines rule out in every engine that has kernels for it."""
    for rule in RULES:
        finding = rule.finds(contents) if rule.blocks else None
        if finding is not None:
            raise PlanError(
                rule.blocks.format(subject=finding.subject),
                where=f"variant {variant}",
                found=finding.found,
                fix="give them one scheme: target or ignore all of them",
            )
