"""Writes the exports of a recipe's artifacts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantlab.exports.export import EXPORT_NAME, export, is_current
from quantlab.exports.target import Progress
from quantlab.plan.model import Plan, VariantPlan
from quantlab.recipe.schemes import FormatName
from quantlab.run.directory import RunDirectory

Announce = Callable[[VariantPlan, FormatName], Progress]
"""Called when an export begins; returns the callback for its progress."""


@dataclass(frozen=True)
class Export:
    """An export of a run.

    Attributes:
        directory: its path.
        made: whether this run wrote it; if not, it was current.
        notes: what its writer noted; empty if it was current.
    """

    directory: Path
    made: bool
    notes: tuple[str, ...] = ()


def write_exports(plan: Plan, directory: RunDirectory, announce: Announce) -> list[Export]:
    """Write the missing and outdated exports of a plan, whose artifacts are finished.

    Args:
        plan: the compiled recipe.
        directory: the output directory.
        announce: called when an export begins.

    Raises:
        ArtifactError: the directory is in use, something else is at the path of an export, or a file cannot be written.
        CheckpointError: a weight cannot be read.
    """
    wanted = [(variant, name) for variant in plan.variants for name in variant.exports]
    if not wanted:
        return []
    found = []
    with directory.locked():
        for variant, name in wanted:
            artifact, out = directory.artifact(variant.name), directory.export(variant.name, name)
            if is_current(artifact, name, out):
                found.append(Export(out, made=False))
                continue
            outdated = (out / EXPORT_NAME).is_file()
            notes = export(artifact, name, out, announce(variant, name), overwrite=outdated)
            found.append(Export(out, made=True, notes=notes))
    return found
