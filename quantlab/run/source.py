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
    room: int,
) -> Iterator[None]:
    """While variants are made, fetch the shards of a hub ahead; a source in a directory is left alone.

    With `keep_source: false` they are kept below the output directory, within the budget of disk, while they are used.

    Args:
        plan: the compiled recipe.
        variants: those that are about to be made.
        recipe: the recipe.
        directory: the output directory.
        budget: bytes that the shards may take; None for what the disk has.
        room: free bytes of the output directory's disk beside the artifacts.

    Raises:
        PlanError: the budget or the disk is too small.
    """
    shards = plan.checkpoint.shards
    if not isinstance(shards, HubShards) or not variants:
        yield
        return
    steps = [(variant.name, block.name) for variant in variants for block in variant.blocks]
    uses = [_files(block) for variant in variants for block in variant.blocks]
    place = directory.source(shards.model.commit)
    keep = recipe.recipe.keep_source
    store = _kept(shards, budget) if keep else _temporary(shards, place, uses, budget, room)
    stream = ShardStream(uses, shards.sizes, store)
    shards.follow(stream, {step: number for number, step in enumerate(steps)})
    try:
        yield
        if not keep:
            stream.close(wait=True)
            shutil.rmtree(place)
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


def _kept(shards: HubShards, budget: int | None) -> Store:
    """The hub's cache, where files stay."""
    here = {name: shards.directory / name for name in shards.names() if shards.is_here(name)}
    total = sum(shards.sizes.values())
    advice = "or write `keep_source: false` in the recipe: shards are then deleted after their use"
    if budget is not None:
        _check_room(total, budget, "--disk", "the whole model: the recipe keeps its source", advice)
    missing = total - sum(shards.sizes[name] for name in here)
    free = shutil.disk_usage(shards.directory).free
    _check_room(missing, free, str(shards.directory), "the shards that are not there yet", f"set HF_HOME, {advice}")
    return Store(shards.fetch_to_cache, here, temporary=False)


def _temporary(shards: HubShards, place: Path, uses: Sequence[frozenset[str]], budget: int | None, room: int) -> Store:
    """A folder below the output directory, where files stay while they are used."""
    least = ShardStream.least_budget(uses, shards.sizes)
    if budget is not None:
        _check_room(least, budget, "--disk", "the files that one block reads")
    make_directory(place)
    held = {name: place / name for name in shards.names() if (place / name).is_file()}
    held = {name: path for name, path in held.items() if path.stat().st_size == shards.sizes[name]}
    room += sum(shards.sizes[name] for name in held)
    _check_room(least, room, str(place), "the files that one block reads", "or choose another --out")
    return Store(
        partial(shards.download, into=place), held, temporary=True, budget=room if budget is None else min(budget, room)
    )


def _check_room(needed: int, there: int, where: str, what: str, advice: str = "") -> None:
    if needed > there:
        raise PlanError(
            "the source needs more disk than there is for it",
            where=where,
            found=f"{there / 1e9:.3g} GB; {needed / 1e9:.3g} GB for {what}",
            fix=f"give or free at least {needed / 1e9:.3g} GB" + (f", {advice}" if advice else ""),
        )
