"""Opens the source of a recipe, and the space that it may take."""

import re
from pathlib import Path
from typing import Annotated

import typer

from quantlab.checkpoint.hub import HubShards, open_hub_model
from quantlab.checkpoint.index import Checkpoint, open_checkpoint
from quantlab.errors import RecipeError
from quantlab.recipe.load import LoadedRecipe, hub_id

DiskOption = Annotated[
    str | None,
    typer.Option(
        help="Space that a model of the hub may take at a time, for recipes with `keep_source: false`.",
        metavar="SIZE",
        show_default="no limit",
    ),
]


def open_source(recipe: LoadedRecipe) -> Checkpoint:
    """Open the model of a recipe: a directory, or a model of the hub, of which only headers are read.

    Raises:
        CheckpointError: it cannot be opened.
        RecipeError: it is neither a directory nor a name.
    """
    if recipe.hub_id is not None:
        model, revision = recipe.hub_id
        return open_hub_model(model, revision=revision)
    return open_checkpoint(recipe.model)


def open_peers(recipe: LoadedRecipe) -> dict[str, Checkpoint]:
    """Open the artifacts of other tools that a recipe names, by the names of their rows.

    Raises:
        CheckpointError: one cannot be opened.
        RecipeError: one is not there.
    """
    return {name: open_checkpoint(recipe.resolve(word, "model")) for name, word in recipe.recipe.peers.items()}


def open_model(word: Path) -> Checkpoint:
    """Open a model of the command line: a directory, or `org/name@revision`.

    Raises:
        CheckpointError: it cannot be opened.
    """
    model = hub_id(str(word), beside=Path())
    return open_checkpoint(word) if model is None else open_hub_model(model[0], revision=model[1])


def described(checkpoint: Checkpoint) -> str:
    """Where the shards of a model of the hub are, and how large they are; empty for a directory."""
    shards = checkpoint.shards
    if not isinstance(shards, HubShards):
        return ""
    here = sum(size for name, size in shards.sizes.items() if shards.is_here(name))
    total = sum(shards.sizes.values())
    rest = f", {here / 1e9:,.3g} GB of it in the hub's cache" if here else ""
    return f"{shards.model.repo} at commit {shards.model.commit}: {len(shards.sizes)} files, {total / 1e9:,.3g} GB{rest}; `run` fetches them"


def size_in_bytes(text: str) -> int:
    """Bytes of a size on the command line, for example `200 GB`.

    Raises:
        RecipeError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", text.strip(), flags=re.IGNORECASE)
    if found is None:
        raise RecipeError(
            "not a size", where="--disk", found=repr(text), fix="write a number and a unit, such as 200GB"
        )
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))
