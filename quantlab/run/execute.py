"""Makes every artifact of a recipe."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from quantlab.checkpoint.reader import Reader
from quantlab.checkpoint.tied import check_tied_head
from quantlab.files import write_atomically
from quantlab.formats.stored import StoredWeights
from quantlab.plan.model import Plan, VariantPlan
from quantlab.recipe.load import LoadedRecipe
from quantlab.run.directory import RunDirectory
from quantlab.run.float16_range import check_float16_range
from quantlab.run.identity import identify
from quantlab.run.loop import Progress, Settings, run_variant
from quantlab.run.source import streamed_source

RECIPE_COPY = ".recipe.yaml"
"""Copy of the recipe in the output directory; `quantlab report` reads the order of rows from it."""

_DEFAULTS = Settings()

Announce = Callable[[VariantPlan], Progress]
"""Called when work on a variant begins; returns the callback for its progress."""


@dataclass(frozen=True)
class MadeArtifacts:
    """Names of variants.

    Attributes:
        made: artifacts made by this run.
        outdated: those among `made` that replace an artifact of other code.
        kept: artifacts that were already complete.
    """

    made: tuple[str, ...]
    outdated: tuple[str, ...]
    kept: tuple[str, ...]


def make_artifacts(
    plan: Plan, recipe: LoadedRecipe, directory: RunDirectory, announce: Announce, settings: Settings = _DEFAULTS
) -> MadeArtifacts:
    """Make the missing and outdated artifacts, one variant after the other.

    Args:
        plan: the compiled recipe.
        recipe: the recipe it was compiled from.
        directory: the output directory.
        announce: called when work on a variant begins.
        settings: of the run; `shared_bytes` is set here.

    Raises:
        ArtifactError: the directory is in use, contains artifacts of another recipe, or cannot be written.
        CheckpointError: a weight cannot be read, is not finite or too large for the dtype it is stored in.
        PlanError: the disk is too small.
    """
    with directory.locked():
        states = {
            variant.name: directory.state(
                variant.name, identify(variant, settings.device), overwrite=settings.overwrite
            )
            for variant in plan.variants
        }
        complete = {name for name, state in states.items() if state == "complete"}
        free = directory.check_space(plan, complete)
        sharing = sum(variant.uses_unchanged_model for variant in plan.variants if variant.name not in complete)
        settings = replace(settings, shared_bytes=free // 2 if sharing > 1 else 0)
        source = StoredWeights(Reader(plan.checkpoint))
        missing = [variant for variant in plan.variants if variant.name not in complete]
        kept = [variant.name for variant in plan.variants if variant.name in complete]
        room = free - settings.shared_bytes
        with streamed_source(plan, missing, recipe, directory, budget=settings.disk, room=room):
            check_tied_head(plan.checkpoint)
            check_float16_range(missing, source)
            for variant in plan.variants:
                if variant.name in complete:
                    directory.tidy(variant)
                else:
                    run_variant(plan, variant, recipe, directory, announce(variant), settings)
        write_atomically(directory.path / RECIPE_COPY, recipe.content)
    outdated = tuple(name for name, state in states.items() if state == "outdated")
    return MadeArtifacts(tuple(variant.name for variant in missing), outdated, tuple(kept))
