"""Make every artifact of a recipe."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from quantlab.files import write_atomically
from quantlab.plan.model import Plan, VariantPlan
from quantlab.recipe.load import LoadedRecipe
from quantlab.run.directory import RunDirectory
from quantlab.run.identity import identify
from quantlab.run.loop import Progress, Settings, run_variant

RECIPE_COPY = ".recipe.yaml"
"""The recipe of a run, kept for the order of its rows."""

_DEFAULTS = Settings()

Announce = Callable[[VariantPlan], Progress]
"""Called when work on a variant begins; returns what is told its progress."""


@dataclass(frozen=True)
class MadeArtifacts:
    """Names of the variants made now, of those among them whose artifact other code had made, and of those that were there already."""

    made: tuple[str, ...]
    outdated: tuple[str, ...]
    kept: tuple[str, ...]


def make_artifacts(
    plan: Plan, recipe: LoadedRecipe, directory: RunDirectory, announce: Announce, settings: Settings = _DEFAULTS
) -> MadeArtifacts:
    """Make the artifacts that are not there yet, one variant after the other.

    Args:
        plan: the compiled recipe.
        recipe: the recipe it was compiled from.
        directory: where results go.
        announce: told which variant begins.
        settings: how to go about it; the disk space for what variants share is found here.

    Raises:
        ArtifactError: the directory is in use, or holds artifacts of another recipe, or cannot be written.
        CheckpointError: a weight cannot be read or is not finite.
        PlanError: the disk is too small.
    """
    made, kept = [], []
    with directory.locked():
        states = {
            variant.name: directory.state(
                variant.name, identify(variant, settings.device), overwrite=settings.overwrite
            )
            for variant in plan.variants
        }
        complete = {name for name, state in states.items() if state == "complete"}
        free = directory.check_space(plan, complete)
        sharing = sum(variant.watches_unchanged for variant in plan.variants if variant.name not in complete)
        settings = replace(settings, shared_bytes=free // 2 if sharing > 1 else 0)
        for variant in plan.variants:
            if variant.name in complete:
                directory.tidy(variant)
                kept.append(variant.name)
            else:
                run_variant(plan, variant, recipe, directory, announce(variant), settings)
                made.append(variant.name)
        write_atomically(directory.path / RECIPE_COPY, recipe.content)
    outdated = tuple(name for name, state in states.items() if state == "outdated")
    return MadeArtifacts(tuple(made), outdated, tuple(kept))
