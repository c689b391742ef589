"""The source of a run while it is read: a directory, or shards of a hub that come and go."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from quantlab.checkpoint.hub import HubShards
from quantlab.checkpoint.index import Checkpoint
from quantlab.checkpoint.stream import ShardStream, Store
from quantlab.errors import PlanError
from quantlab.plan.model import Block, Plan, VariantPlan
from quantlab.recipe.load import LoadedRecipe
from quantlab.run.directory import RunDirectory, make_directory


@contextmanager
def streamed_source(
    plan: Plan,
    variants: Sequence[VariantPlan],
    recipe: LoadedRecipe,
    directory: RunDirectory,
    *,
    budget: int | None,
) -> Iterator[None]:
    """While variants are made, fetch the shards of a hub ahead; a source in a directory is left alone.

    With `keep_source: false` they are kept below the output directory, within the budget of disk, while they are used.

    Args:
        plan: the compiled recipe.
        variants: those that are about to be made.
        recipe: the recipe.
        directory: the output directory.
        budget: bytes that the shards may take; None for no limit.

    Raises:
        PlanError: the budget is too small.
    """
    shards = plan.checkpoint.shards
    if not isinstance(shards, HubShards) or not variants:
        yield
        return
    steps = [(variant.name, block.name) for variant in variants for block in variant.blocks]
    uses = [_files(block) for variant in variants for block in variant.blocks]
    if recipe.recipe.keep_source:
        _check_budget(sum(shards.sizes.values()), budget, "the whole model: the recipe keeps its source")
        here = {name: shards.directory / name for name in shards.names() if shards.is_here(name)}
        store = Store(shards.fetch_to_cache, here, temporary=False)
    else:
        least = ShardStream.least_budget(uses, shards.sizes)
        _check_budget(least, budget, "the files that one block reads")
        place = directory.source(shards.model.commit)
        make_directory(place)
        store = Store(partial(shards.download, into=place), _held(place, shards), temporary=True, budget=budget)
    stream = ShardStream(uses, shards.sizes, store)
    shards.follow(stream, {step: number for number, step in enumerate(steps)})
    try:
        yield
        if not recipe.recipe.keep_source:
            stream.close(wait=True)
            shutil.rmtree(directory.source(shards.model.commit))
    finally:
        stream.close()
        shards.unfollow()


def reached(checkpoint: Checkpoint, variant: VariantPlan, block: Block) -> None:
    """Say which block a run has come to."""
    if isinstance(checkpoint.shards, HubShards):
        checkpoint.shards.reach((variant.name, block.name))


def _files(block: Block) -> frozenset[str]:
    """The source files that a block reads."""
    entries = [entry for shard in block.shards for step in shard.steps for entry in (step.source, step.scale)]
    return frozenset(entry.file.name for entry in entries if entry is not None)


def _held(place: Path, shards: HubShards) -> dict[str, Path]:
    """The complete files that an earlier run left."""
    found = {name: place / name for name in shards.names() if (place / name).is_file()}
    return {name: path for name, path in found.items() if path.stat().st_size == shards.sizes[name]}


def _check_budget(needed: int, budget: int | None, what: str) -> None:
    if budget is not None and needed > budget:
        raise PlanError(
            "the source needs more disk than it may take",
            where="--disk",
            found=f"{budget / 1e9:.3g} GB; {needed / 1e9:.3g} GB for {what}",
            fix=f"give at least {needed / 1e9:.3g} GB"
            + ("" if "block" in what else ", or write `keep_source: false`: shards are deleted when room is needed"),
        )
