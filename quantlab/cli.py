"""The command line: verbs are stages. A recipe says what; options say only where and how fast."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from quantlab import console as show
from quantlab.architectures.families import detect
from quantlab.checkpoint.hub import download
from quantlab.checkpoint.index import Checkpoint, open_checkpoint
from quantlab.errors import QuantlabError
from quantlab.plan.compile import code_version, compile_plan
from quantlab.plan.model import Plan
from quantlab.plan.source import survey
from quantlab.recipe.load import LoadedRecipe, load_recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Quantize, prune and convert DeepSeek checkpoints, and measure what each variant costs and saves.\n\n"
    "Start with `quantlab plan RECIPE` (seconds, reads headers only), then `quantlab run RECIPE`.",
)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
OutOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="Output directory.", show_default="runs/NAME-OF-THE-RECIPE")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and no tables.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output, nothing else.")]

_out = Console()
_err = Console(stderr=True)


@app.command()
def plan(
    recipe: RecipeArgument,
    ledger: Annotated[
        str | None, typer.Option(help="Print what becomes of every tensor of this variant.", metavar="VARIANT")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a recipe would make, from headers alone: sizes, memory, the fate of every tensor, serving rules."""
    _, compiled = _compile(recipe)
    if as_json:
        typer.echo(json.dumps(show.plan_json(compiled), indent=1))
        return
    _out.print(show.checkpoint_table(survey(compiled.checkpoint, compiled.architecture)))
    _out.print(show.plan_table(compiled))
    _out.print(show.outcome_table(compiled))
    for variant in compiled.variants:
        for note in variant.notes:
            _out.print(f"[bold]{variant.name}[/]: {note}", highlight=False)
        if ledger == variant.name:
            _out.print(show.ledger_table(variant))


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Directory with config.json and safetensors.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Say what is in a checkpoint: family, roles, dtypes, parameters, bytes."""
    opened = open_checkpoint(checkpoint)
    architecture = detect(opened.config)
    weights = survey(opened, architecture)
    if as_json:
        tensors = [
            {
                "tensor": weight.entry.name,
                "role": weight.claim.role,
                "dtype": weight.entry.dtype,
                "shape": weight.entry.shape,
                "file": weight.entry.file.name,
            }
            for weight in weights
        ]
        typer.echo(json.dumps({"architecture": architecture.class_name, "tensors": tensors}, indent=1))
        return
    fp8 = f", FP8 in blocks of {opened.fp8_block[0]}x{opened.fp8_block[1]}" if opened.fp8_block else ""
    _out.print(f"[bold]{architecture.class_name}[/] in {len(opened.files)} files{fp8}", highlight=False)
    _out.print(show.checkpoint_table(weights))


def main() -> None:
    """Entry point: errors of ours become messages and exit code 1, an interruption 130."""
    try:
        app()
    except QuantlabError as error:
        show.print_error(_err, error)
        sys.exit(1)
    except KeyboardInterrupt:
        _err.print("interrupted; run the same command again to continue")
        sys.exit(130)


def _compile(path: Path) -> tuple[LoadedRecipe, Plan]:
    loaded = load_recipe(path)
    return loaded, compile_plan(loaded.recipe, _open_source(loaded), code_version=code_version())


def _open_source(recipe: LoadedRecipe) -> Checkpoint:
    if recipe.hub_id is not None:
        model, revision = recipe.hub_id
        return open_checkpoint(download(model, revision=revision))
    return open_checkpoint(recipe.resolve(recipe.recipe.model))
