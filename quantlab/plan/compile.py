"""Recipe x headers x architecture -> Plan. Reads headers, of the weights only a head that should be tied: no device, no
torch."""

import fnmatch
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence

from quantlab.architectures.architecture import DEFAULT_TARGETS, Architecture
from quantlab.architectures.config import Config
from quantlab.architectures.detect import detect
from quantlab.checkpoint.index import Checkpoint
from quantlab.checkpoint.tied import check_tied_head
from quantlab.errors import PlanError
from quantlab.formats.dtype import dtype_of, dtype_of_weights
from quantlab.formats.engine_rules.table import verdicts
from quantlab.formats.layouts import LAYOUTS
from quantlab.formats.understood import understood
from quantlab.plan.contents import planned_contents
from quantlab.plan.experts import kept_experts, removal_notes, without_experts
from quantlab.plan.exports import check_exports, formats_beside
from quantlab.plan.folds import check_folds_of_fewer_experts, fold_notes, mark_folds
from quantlab.plan.memory import calibrated_peak_memory, peak_memory
from quantlab.plan.model import Block, Outcome, Plan, Shard, Step, VariantPlan
from quantlab.plan.peers import check_peer
from quantlab.plan.serving import check_serving_rules, serving_notes, tensor_parallel_sizes
from quantlab.plan.source import FLOATING, SourceWeight, survey
from quantlab.recipe.algorithms import ExpertRemoval, Rtn
from quantlab.recipe.schema import Calibration, Cast, NOfM, Prune, Quantize, Recipe, Variant
from quantlab.recipe.schemes import DTYPE_WORDS, SCHEMES, FloatDtype
from quantlab.recipe.texts import TextChoices

LARGEST_SHARD = 5_000_000_000
_WIDE = {"F32", "F64"}
_NO_NUMBER = {"corpus", "dataset", "mix", "memory", "dtype", *TextChoices.model_fields}
"""Calibration fields excluded from a recipe's key: `corpus_sha256` stands for the text, the dtype belongs to the device."""

AnyPass = Cast | Quantize | Prune


def compile_plan(
    recipe: Recipe, checkpoint: Checkpoint, *, corpus_sha256: str = "", peers: Mapping[str, Checkpoint] | None = None
) -> Plan:
    """Plan every variant of a recipe.

    Args:
        recipe: the validated recipe.
        checkpoint: the source, headers only.
        corpus_sha256: hash of what decides the calibration text; part of the key of every variant that uses it.
        peers: the recipe's peers by name, headers only; None for none.

    Raises:
        CheckpointError: the source is incomplete or not supported, or its config.json cannot be right.
        ArtifactError: a peer has numbers that are not read.
        PlanError: a peer is another model, a pass matches no tensor, no engine could serve the result, a format cannot
            express it, or a calibration sample is longer than the model's context.
    """
    checkpoint = understood(checkpoint)
    architecture = detect(checkpoint.config)
    config = architecture.read(checkpoint.config)
    _check_length(recipe.calibration, architecture, config)
    weights = survey(checkpoint, architecture)
    if recipe.calibration is not None and recipe.calibration.coverage is not None:
        _check_experts(weights)
    check_tied_head(checkpoint, fetch=False)
    dtype_of(checkpoint)  # the source is measured in it
    fingerprint = checkpoint.fingerprint()
    variants = []
    for name, wanted in recipe.variants.items():
        calibrated = any(step.calibrated for step in wanted.passes)
        calibration = recipe.calibration if calibrated else None
        seed = fingerprint
        if calibration is not None:
            seed += f" {corpus_sha256} {calibration.model_dump_json(exclude=_NO_NUMBER, exclude_defaults=True)}"
        variants.append(
            _plan_variant(
                name,
                wanted,
                weights,
                calibration=calibration,
                seed=seed,
                checkpoint=checkpoint,
            )
        )
    found = (check_peer(name, peer, checkpoint) for name, peer in (peers or {}).items())
    return Plan(checkpoint, architecture, tuple(variants), tuple(found))


def describe(passes: Sequence[AnyPass]) -> str:
    """The passes in one readable line."""
    words: list[str] = []
    for step in passes:
        match step:
            case Cast(cast=dtype):
                words.append(dtype)
                continue
            case Quantize(quantize=scheme, algorithm=algorithm):
                clip = f", {step.clip} clip" if isinstance(algorithm, Rtn) and step.clip != "none" else ""
                word = f"{scheme} ({algorithm.name}{clip})"
            case Prune(prune=sparsity, algorithm=algorithm):
                share = str(sparsity) if isinstance(sparsity, NOfM) else f"{sparsity:.3g}"
                word = f"prune {share} ({algorithm.name})"
        default = ("routed_experts",) if isinstance(step.algorithm, ExpertRemoval) else DEFAULT_TARGETS
        words.append(word if step.targets == default else f"{word} of {'+'.join(step.targets)}")
    return " → ".join(words)


def _check_length(calibration: Calibration | None, architecture: Architecture, config: Config) -> None:
    """Raise an error if a calibration sample is longer than the context that the model was made for."""
    context = architecture.context_length(config)
    if calibration is not None and context and calibration.length > context:
        raise PlanError(
            "a calibration sample is longer than the model's context",
            where="calibration.length",
            found=f"{calibration.length} tokens, max_position_embeddings is {context}",
            fix=f"use a `length` of at most {context}",
        )


def _check_experts(weights: Sequence[SourceWeight]) -> None:
    """Raise an error if coverage is asked of a model without routed experts."""
    if not any(weight.tensor.role == "routed_experts" for weight in weights):
        raise PlanError(
            "the model has no routed experts to cover",
            where="calibration.coverage",
            found="a dense model",
            fix="leave `coverage` out",
        )


def _plan_variant(
    name: str,
    wanted: Variant,
    weights: Sequence[SourceWeight],
    *,
    calibration: Calibration | None,
    seed: str,
    checkpoint: Checkpoint,
) -> VariantPlan:
    passes = wanted.passes
    architecture = detect(checkpoint.config)
    config = architecture.read(checkpoint.config)
    cast = next((step.cast for step in passes if isinstance(step, Cast)), None)
    changes = [step for step in passes if not isinstance(step, Cast)]
    steps = [_plan_step(weight, _applied(changes, weight, variant=name), cast) for weight in weights]
    _check_matches(changes, steps, variant=name)
    removal, kept = None, None
    for step in changes:
        if isinstance(step, Prune) and isinstance(step.algorithm, ExpertRemoval):
            removal, kept = step.algorithm, kept_experts(step, architecture, config, variant=name)
            steps = without_experts(steps, removal, kept=kept)
    what = json.dumps([step.model_dump(exclude_defaults=True) for step in passes], sort_keys=True)
    steps = mark_folds(steps, variant=name)
    if removal is not None and calibration is not None and calibration.propagate == "quantized":
        check_folds_of_fewer_experts(steps, variant=name)
    stored = [step for step in steps if step.outputs]
    dtype = cast or dtype_of_weights(weight.entry for weight in weights)
    contents = planned_contents(stored, checkpoint, architecture, dtype=dtype, experts=kept)
    check_serving_rules(stored, contents, variant=name)
    exports = formats_beside(wanted.format, contents)
    check_exports(exports, contents, variant=name)
    return VariantPlan(
        name=name,
        description=describe(passes),
        dtype=dtype,
        blocks=_blocks(steps),
        calibration=calibration,
        removal=removal,
        experts=kept,
        algorithms=_algorithms(changes),
        recipe_key=hashlib.sha256(f"{LARGEST_SHARD} {seed} {what}".encode()).hexdigest(),
        peak_memory_bytes=calibrated_peak_memory(steps, calibration) if calibration else peak_memory(steps),
        tensor_parallel=tensor_parallel_sizes(stored, heads=config["num_attention_heads"]),
        engines=verdicts(contents),
        notes=(*serving_notes(stored), *fold_notes(steps), *removal_notes(steps, kept=kept)),
        exports=exports,
    )


def _algorithms(passes: Sequence[Prune | Quantize]) -> tuple[str, ...]:
    """Sorted names of the algorithms used; every quantize pass also uses `rtn`, at least for comparison."""
    rounding = {"rtn"} if any(isinstance(step, Quantize) for step in passes) else set()
    return tuple(sorted({step.algorithm.name for step in passes} | rounding))


def _applied(passes: Sequence[Prune | Quantize], weight: SourceWeight, *, variant: str) -> tuple[Prune | Quantize, ...]:
    """The passes that change a weight."""
    tensor = weight.tensor
    if tensor.rule is None or not tensor.rule.linear or tensor.role == "mtp" or not weight.entry.elements:
        return ()
    module = tensor.name.removesuffix(".weight")
    applied = tuple(
        step
        for step in passes
        if tensor.role in step.targets and not any(fnmatch.fnmatchcase(module, pattern) for pattern in step.ignore)
    )
    for kind in (Prune, Quantize):
        same = [step for step in applied if isinstance(step, kind)]
        if len(same) > 1:
            raise PlanError(
                "two passes of one kind target the same weight",
                where=f"variant {variant}, {tensor.name}",
                found=describe(same),
                fix="make their targets disjoint",
            )
    return applied


def _plan_step(weight: SourceWeight, passes: tuple[Prune | Quantize, ...], cast: FloatDtype | None) -> Step:
    entry, tensor = weight.entry, weight.tensor
    exact = tensor.rule is not None and tensor.rule.exact
    dtype = DTYPE_WORDS[cast] if cast and entry.dtype in FLOATING and not exact else weight.dtype
    quantize = next((step for step in passes if isinstance(step, Quantize)), None)
    scheme = SCHEMES[quantize.quantize] if quantize is not None else None
    outcome: Outcome
    if scheme is not None:
        dtype = "BF16" if dtype in _WIDE else dtype
        outcome, reason = "quantized", describe(passes)
    elif passes:
        outcome, reason = "pruned", describe(passes)
    elif dtype != entry.dtype:
        outcome, reason = "cast", f"{entry.dtype} to {dtype}" + (" by its block scales" if weight.scale else "")
    else:
        unknown = "no rule of the architecture knows it" if tensor.rule is None else "no pass targets it"
        outcome, reason = "kept", unknown if entry.elements else "it has no elements"
    layout, number = (LAYOUTS[scheme.layout], scheme.format) if scheme else (LAYOUTS["dense"], None)
    outputs = layout.stored_tensors(tensor.name, entry.shape, number, dtype)
    return Step(tensor, entry, weight.scale, passes, dtype, outcome, reason, outputs)


def _check_matches(passes: Sequence[Prune | Quantize], steps: Sequence[Step], *, variant: str) -> None:
    """Raise an error for a target or an ignore pattern that matches nothing.

    Raises:
        PlanError: a target, a pass or an ignore pattern has no effect.
    """
    modules = [
        (step.tensor.role, step.tensor.name.removesuffix(".weight"))
        for step in steps
        if step.tensor.rule and step.tensor.rule.linear and step.source.elements
    ]
    roles = sorted({role for role, _ in modules})
    for step in passes:
        explicit = "targets" in step.model_fields_set
        absent = [target for target in step.targets if target not in roles]
        if absent and (explicit or len(absent) == len(step.targets)):
            raise PlanError(
                "a target matches nothing",
                where=f"variant {variant}, {describe([step])}",
                found=f"no linear of role {', '.join(absent)} in this checkpoint",
                fix=f"its linears have the roles {', '.join(roles)}",
            )
        if not any(step in planned.passes for planned in steps):
            raise PlanError(
                "a pass changes nothing",
                where=f"variant {variant}, {describe([step])}",
                found=f"every targeted linear is ignored by {', '.join(step.ignore)}",
                fix="ignore fewer linears, or remove the pass",
            )
        for pattern in step.ignore:
            if not any(role in step.targets and fnmatch.fnmatchcase(module, pattern) for role, module in modules):
                raise PlanError(
                    "an ignore pattern matches nothing",
                    where=f"variant {variant}, {describe([step])}",
                    found=f"no targeted linear is called `{pattern}`",
                    fix="give a glob on names like "
                    + next((module for role, module in modules if role in step.targets), "model.layers.0.*"),
                )


def _blocks(steps: Sequence[Step]) -> tuple[Block, ...]:
    """Group the steps into blocks, and split each block into shards of at most `LARGEST_SHARD` bytes."""
    grouped: list[tuple[str, list[list[Step]]]] = []
    for name, members in itertools.groupby(steps, key=lambda step: step.tensor.block):
        block = list(members)
        if grouped and not any(step.outputs for step in block):
            grouped[-1][1][-1].extend(block)  # the block stores nothing: its ledger joins the previous block
            continue
        shards: list[list[Step]] = [[]]
        size = 0
        for step in block:
            if shards[-1] and size + step.output_bytes > LARGEST_SHARD:
                shards.append([])
                size = 0
            shards[-1].append(step)
            size += step.output_bytes
        grouped.append((name, shards))
    total = sum(len(shards) for _, shards in grouped)
    number = itertools.count(1)
    return tuple(
        Block(
            name, tuple(Shard(f"model-{next(number):05d}-of-{total:05d}.safetensors", tuple(shard)) for shard in shards)
        )
        for name, shards in grouped
    )
