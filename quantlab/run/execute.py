"""Make every artifact of a recipe."""

from collections.abc import Callable
from dataclasses import dataclass

from quantlab.plan.model import Plan, VariantPlan
from quantlab.recipe.load import LoadedRecipe
from quantlab.run.directory import RunDirectory
from quantlab.run.loop import Progress, run_variant

Announce = Callable[[VariantPlan], Progress]
"""Called when work on a variant begins; returns what is told its progress."""


@dataclass(frozen=True)
class MadeArtifacts:
    """Names of the variants made now, and of those that were there already."""

    made: tuple[str, ...]
    kept: tuple[str, ...]


def make_artifacts(
    plan: Plan, recipe: LoadedRecipe, directory: RunDirectory, announce: Announce, *, overwrite: bool = False
) -> MadeArtifacts:
    """Make the artifacts that are not there yet, one variant after the other.

    Args:
        plan: the compiled recipe.
        recipe: the recipe it was compiled from.
        directory: where results go.
        announce: told which variant begins.
        overwrite: replace artifacts and unfinished work of other recipes instead of refusing.

    Raises:
        ArtifactError: the directory is in use, or holds artifacts of another recipe, or cannot be written.
        CheckpointError: a weight cannot be read or is not finite.
        PlanError: the disk is too small.
    """
    made, kept = [], []
    with directory.locked():
        if overwrite:
            for variant in plan.variants:
                directory.discard_foreign(variant)
        complete = {variant.name for variant in plan.variants if directory.is_complete(variant)}
        directory.check_space(plan)
        for variant in plan.variants:
            if variant.name in complete:
                directory.journal(variant.name).unlink(missing_ok=True)
                kept.append(variant.name)
            else:
                run_variant(plan, variant, recipe, directory, announce(variant))
                made.append(variant.name)
    return MadeArtifacts(tuple(made), tuple(kept))
