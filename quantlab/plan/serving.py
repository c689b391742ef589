"""Requirements of serving engines on a quantized checkpoint, checked on the plan.

vLLM or SGLang enforce each of these rules at load time, which would be hours later.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from quantlab.errors import PlanError
from quantlab.formats.layouts import method_of_layout
from quantlab.plan.model import Step
from quantlab.recipe.schema import Prune
from quantlab.recipe.schemes import SCHEMES, Scheme

_TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)


def check_serving_rules(steps: Sequence[Step], *, variant: str) -> None:
    """Check that engines can serve the planned artifact.

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
    _check_fused(steps, variant=variant)
    _check_experts(steps, variant=variant)


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
    """Notes on limits of engines that do not make the plan invalid."""
    notes = []
    if any(step.tensor.role == "kv_b" and step.layout == "pack-quantized" for step in steps):
        notes.append("kv_b is packed: SGLang reads kv_b_proj only unquantized, vLLM loads it")
    schemes = {
        role: {step.scheme for step in steps if step.tensor.role == role}
        for role in ("routed_experts", "shared_experts")
    }
    if (
        schemes["routed_experts"]
        and schemes["shared_experts"]
        and schemes["routed_experts"] != schemes["shared_experts"]
    ):
        notes.append(
            "shared and routed experts differ: SGLang needs --disable-shared-experts-fusion for DeepSeek-V3 and R1"
        )
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


def _check_fused(steps: Sequence[Step], *, variant: str) -> None:
    groups: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        if (group := step.tensor.fusion_group) is not None:
            groups[group].append(step)
    for group, members in groups.items():
        _check_one_scheme(members, what=f"engines fuse these matrices into one ({group})", variant=variant)


def _check_experts(steps: Sequence[Step], *, variant: str) -> None:
    layers: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        if step.tensor.role == "routed_experts" and step.tensor.expert is not None:
            layers[step.tensor.block].append(step)
    for layer, members in layers.items():
        _check_one_scheme(members, what=f"engines use one kernel for all experts of a layer ({layer})", variant=variant)


def _check_one_scheme(members: Sequence[Step], *, what: str, variant: str) -> None:
    first = members[0]
    for other in members[1:]:
        if first.scheme != other.scheme:
            names = [step.scheme.name if step.scheme else "no scheme" for step in (first, other)]
            raise PlanError(
                f"{what}, but their schemes differ",
                where=f"variant {variant}",
                found=f"{first.tensor.name}: {names[0]}; {other.tensor.name}: {names[1]}",
                fix="give them one scheme: target or ignore all of them",
            )
