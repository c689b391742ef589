"""The command line: one command per stage. The recipe defines the results; options set paths, devices and limits."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from quantlab import console as show
from quantlab.dataset_commands import datasets
from quantlab.doctor import doctor
from quantlab.documents import nearest
from quantlab.engine_commands import JsonOption, QuietOption, engines, verify
from quantlab.errors import ArtifactError, QuantlabError, RecipeError
from quantlab.evaluation.manifest import check_unchanged
from quantlab.evaluation.suite import load_suite
from quantlab.exports.targets import TARGETS
from quantlab.inspection import inspect_checkpoint
from quantlab.plan.compile import compile_plan
from quantlab.plan.model import Plan
from quantlab.plan.source import survey
from quantlab.push import push
from quantlab.recipe.load import LoadedRecipe, load_recipe
from quantlab.recipe.schemes import FormatName
from quantlab.report.claims.check import load_claims
from quantlab.report.comparison.compare import GRAMMAR
from quantlab.report.comparison.compare import compare as compare_records
from quantlab.report.comparison.terminal import print_comparison
from quantlab.report.files import CLAIMS_NAME, find_records, read_records, write_report
from quantlab.report.leaderboard.files import write_leaderboard
from quantlab.report.leaderboard.terminal import print_leaderboard
from quantlab.report.matrix.matrix import Matrix
from quantlab.report.matrix.terminal import print_matrix
from quantlab.shipped_commands import recipes
from quantlab.source import DiskOption, described, open_peers, open_source, size_in_bytes
from quantlab.text_notes import keep_overlap, text_notes
from quantlab.texts.locate import Commits, with_located_text
from quantlab.version import VERSION

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

RecipeArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE", help="The recipe, a YAML file, or a name of `quantlab recipes`.", show_default=False
    ),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="Output directory.", show_default="runs/NAME-OF-THE-RECIPE")
]
DeviceOption = Annotated[
    str,
    typer.Option(
        help="Device for calibration and measurements: cpu, cuda, cuda:1; auto selects CUDA if a GPU is available."
    ),
]
TimeLimitOption = Annotated[
    float,
    typer.Option(min=1, help="Abort a single measurement or task after this many seconds.", metavar="SECONDS"),
]

_out = Console()
_err = Console(stderr=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantlab {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Quantize, prune and convert DeepSeek checkpoints, and measure what each variant costs and saves.

    Start with `quantlab plan RECIPE` (seconds, reads headers only), then `quantlab run RECIPE`.
    """


@app.command()
def plan(
    recipe: RecipeArgument,
    ledger: Annotated[
        str | None, typer.Option(help="Print the outcome of every tensor of this variant.", metavar="VARIANT")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the plan of a recipe, from headers alone: sizes, memory, the outcome of every tensor, rules of engines.

    A recipe names its calibration text by `corpus: FILE.jsonl`, `dataset: NAME` or `mix: [{dataset: NAME, share: 0.3}, …]`. NAME is a Hugging Face
    id, a file, a folder, or a preset; `quantlab datasets` lists the presets.
    """
    loaded, compiled, _ = _compile(recipe)
    names = [variant.name for variant in compiled.variants]
    if ledger is not None and ledger not in names:
        raise RecipeError(
            "the recipe has no such variant", where="--ledger", found=repr(ledger), fix=nearest(ledger, names)
        )
    if as_json:
        typer.echo(json.dumps({**show.plan_json(compiled), "text": list(text_notes(loaded))}, indent=1))
        return
    if about := described(compiled.checkpoint):
        _out.print(about, highlight=False, markup=False)
    _out.print(show.checkpoint_table(survey(compiled.checkpoint, compiled.architecture)))
    _out.print(show.plan_table(compiled))
    _out.print(show.outcome_table(compiled))
    _out.print(show.rules_table(compiled))
    for note in text_notes(loaded):
        _out.print(note, highlight=False, markup=False, soft_wrap=True)
    for variant in compiled.variants:
        for note in variant.notes:
            _out.print(f"{variant.name}: {note}", highlight=False, markup=False)
        for name in variant.exports:
            _out.print(
                f"{variant.name}: also written as {name}: {TARGETS[name].description}", highlight=False, markup=False
            )
        if ledger == variant.name:
            _out.print(show.ledger_table(variant))
    for peer in compiled.peers:
        _out.print(f"{peer.name}: measured, not made: {peer.description}", highlight=False, markup=False)


@app.command()
def inspect(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="Directory with config.json and safetensors, or org/name@revision.", show_default=False),
    ],
    as_json: JsonOption = False,
) -> None:
    """Show the contents of a checkpoint: family, roles, dtypes or schemes, parameters, bytes."""
    inspect_checkpoint(checkpoint, _out, as_json=as_json)


@app.command()
def run(  # noqa: PLR0913 - options of a command
    recipe: RecipeArgument,
    out: OutOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace artifacts made from another recipe or on another device.")
    ] = False,
    device: DeviceOption = "auto",
    disk: DiskOption = None,
    time_limit: TimeLimitOption = 3600.0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make and measure every artifact of a recipe and print the matrix. Run again after an interruption to continue."""
    started = time.monotonic()
    loaded, compiled, commits = _compile(recipe, out)
    if loaded.suite is not None:
        load_suite(loaded.suite)  # report errors in it before the long work
    if loaded.claims is not None:
        load_claims(loaded.claims)
    from quantlab.run.loop import Settings  # imports torch, which `plan` and `--help` do without
    from quantlab.runtime.device import find_device
    from quantlab.stages import Measuring, check, export_artifacts, make, measure

    directory, found, silent = _directory(loaded, out), find_device(device), quiet or as_json
    with _interruptible():
        checked = check(loaded, compiled, directory, commits, time_limit=time_limit, console=_err, quiet=silent)
    settings = Settings(device=found, overwrite=overwrite, disk=None if disk is None else size_in_bytes(disk))
    with _interruptible():
        made = make(loaded, compiled, directory, settings, console=_err, quiet=silent)
        exports = export_artifacts(compiled, directory, console=_err, quiet=silent)
    keep_overlap(checked.overlap, directory)
    if not silent:
        show.print_artifacts(_err, made=made.made, outdated=made.outdated, kept=made.kept, directory=directory)
        for one in exports:
            show.print_export(_err, one.directory, one.notes, made=one.made)
    if checked.overlap is not None and not silent:
        _err.print(checked.overlap.text, style="dim", highlight=False, markup=False)
    if loaded.recipe.evaluate is None:
        if as_json:
            artifacts = [str(directory / "artifacts" / name) for name in loaded.recipe.variants]
            typer.echo(json.dumps({"artifacts": artifacts, "exports": [str(one.directory) for one in exports]}))
        return
    with _interruptible():
        how = Measuring(device=found, time_limit=time_limit, reuse=True, quiet=silent, held_out=checked.held_out)
        matrix = measure(loaded, compiled, directory, how, console=_err)
    _show_matrix(matrix, directory, quiet=quiet, as_json=as_json)
    if not silent:
        _err.print(f"{time.monotonic() - started:.0f} s in all", style="dim")
    _exit_if_not_measured(matrix, loaded.recipe.evaluate.verify, shown=not silent)


@app.command("eval")
def evaluate_artifacts(
    recipe: RecipeArgument,
    out: OutOption = None,
    again: Annotated[
        bool, typer.Option("--again", help="Measure everything again instead of keeping valid records.")
    ] = False,
    device: DeviceOption = "auto",
    time_limit: TimeLimitOption = 3600.0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the artifacts made by `run` and print the matrix."""
    loaded, compiled, commits = _compile(recipe, out)
    if loaded.recipe.evaluate is None:
        raise RecipeError(
            "the recipe does not say what to measure",
            where=str(recipe),
            found="no `evaluate`",
            fix="add `evaluate: {suite: quick}`",
        )
    from quantlab.runtime.device import find_device
    from quantlab.stages import Measuring, check, measure

    directory, silent = _directory(loaded, out), quiet or as_json
    with _interruptible():
        checked = check(loaded, compiled, directory, commits, time_limit=time_limit, console=_err, quiet=silent)
    how = Measuring(find_device(device), time_limit, not again, silent, held_out=checked.held_out)
    with _interruptible():
        matrix = measure(loaded, compiled, directory, how, console=_err)
    keep_overlap(checked.overlap, directory)
    _show_matrix(matrix, directory, quiet=quiet, as_json=as_json)
    _exit_if_not_measured(matrix, loaded.recipe.evaluate.verify, shown=not (quiet or as_json))


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="Output directory of a run, with its records.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Rebuild the matrix from the records of a run, without measuring."""
    records = read_records(directory / "records")
    for record in records:
        if record.artifact == f"artifacts/{record.variant}":
            check_unchanged(directory / record.artifact)
    copies = [directory / name for name in (".recipe.yaml", "recipe.yaml") if (directory / name).is_file()]
    for copy in copies[:1]:  # the second name is that of results kept in a repository
        order = load_recipe(copy).recipe.rows
        records.sort(key=lambda record: order.index(record.variant) if record.variant in order else len(order))
    claims = directory / CLAIMS_NAME
    matrix = write_report(records, directory, claims=claims if claims.is_file() else None)
    _show_matrix(matrix, directory, quiet=False, as_json=as_json)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help=f"{GRAMMAR[0].upper()}{GRAMMAR[1:]}.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="The same.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Show what differs between two runs or two variants, and which differences are statistically significant.

    `quantlab compare runs/old runs/new` compares every variant of both;
    `quantlab compare runs/new/artifacts/int8 runs/new/artifacts/w4a16` compares two variants.
    """
    comparison = compare_records(find_records(a), find_records(b), names=(str(a), str(b)))
    if as_json:
        typer.echo(comparison.model_dump_json(indent=1))
    else:
        print_comparison(comparison, _out)


@app.command()
def leaderboard(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Output directories of runs, or of their records.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output directory.")] = Path("leaderboard"),
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Merge runs into one ranked table: leaderboard.html, .md, .csv and .json."""
    board = write_leaderboard(directories, out)
    if as_json:
        typer.echo(board.to_json())
    elif not quiet:
        print_leaderboard(board, _out)
        _err.print(f"{out}/leaderboard.html, .md, .csv, .json", style="dim", highlight=False, markup=False)


@app.command()
def export(
    artifact: Annotated[Path, typer.Argument(help="A directory under runs/NAME/artifacts.", show_default=False)],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            help="; ".join(f"`{name}`: {one.description}" for name, one in TARGETS.items()) + ".",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Directory to make.", show_default="runs/NAME/exports/ARTIFACT.FORMAT"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a finished artifact in the format of another program, from the same integers.

    Nothing is rounded again: `quantlab export runs/quickstart/artifacts/w4a16 --format gptq` writes
    runs/quickstart/exports/w4a16.gptq. A recipe does the same with `{passes: […], format: gptq}`.
    """
    name = _format(format)
    from quantlab.exports.export import default_out  # imports torch
    from quantlab.stages import export_artifact

    where = out or default_out(artifact, name)
    with _interruptible():
        notes = export_artifact(artifact, name, where, overwrite=overwrite, console=_err, quiet=quiet or as_json)
    if as_json:
        typer.echo(json.dumps({"export": str(where), "notes": notes}))
    elif not quiet:
        show.print_export(_err, where, notes, made=True)


def _format(word: str) -> FormatName:
    """A word of the command line as a format."""
    found = next((name for name in TARGETS if name == word), None)
    if found is None:
        raise ArtifactError("unknown format", where="--format", found=repr(word), fix=nearest(word, list(TARGETS)))
    return found


for command in (verify, push, recipes, datasets, doctor):  # after those above, in the order of --help
    app.command()(command)
app.add_typer(engines, name="engines")


def main() -> None:
    """Entry point. A `QuantlabError` is printed without a traceback, and the exit code is 1."""
    try:
        app()
    except QuantlabError as error:
        show.print_error(_err, error)
        sys.exit(1)


@contextmanager
def _interruptible() -> Iterator[None]:
    """On Ctrl-C, print how to continue and exit with code 130."""
    try:
        yield
    except KeyboardInterrupt:
        _err.print("interrupted; run the same command again to continue")
        raise typer.Exit(130) from None


def _compile(path: Path, out: Path | None = None) -> tuple[LoadedRecipe, Plan, Commits]:
    """The recipe with its datasets located, its plan, and the commits of the datasets."""
    loaded = load_recipe(path)
    _ = loaded.suite, loaded.claims  # an unknown name is an error now
    source, commits = open_source(loaded), Commits(_directory(loaded, out))
    loaded = with_located_text(loaded, source.directory, commits)
    plan = compile_plan(loaded.recipe, source, corpus_sha256=loaded.corpus_sha256(), peers=open_peers(loaded))
    return loaded, plan, commits


def _directory(recipe: LoadedRecipe, out: Path | None) -> Path:
    return out or Path("runs") / recipe.name


def _show_matrix(matrix: Matrix, directory: Path, *, quiet: bool, as_json: bool) -> None:
    if as_json:
        typer.echo(matrix.to_json())
    elif not quiet:
        print_matrix(matrix, _out)
        _err.print(f"{directory}/matrix.html, .md, .csv, .json", style="dim", highlight=False, markup=False)


def _exit_if_not_measured(matrix: Matrix, engines: Sequence[str], *, shown: bool) -> None:
    """Exit with code 1 if a variant has no quality, or one of the recipe's engines refuses it or computes something else.

    What failed is printed on standard error unless the matrix was shown.
    """
    verdicts = [
        (row.variant, one) for row in matrix.rows for one in row.record.engines if one.engine in engines and one.fails
    ]
    if not shown:
        failed = [f"{row.variant}: {failure.cell}: {failure.reason}" for row in matrix.rows for failure in row.failures]
        failed += [f"{variant}: {one.engine} {one.verdict}: {one.reason}" for variant, one in verdicts]
        for text in failed:
            _err.print(text, style="red", highlight=False, markup=False)
    if verdicts or any(row.quality is None for row in matrix.rows):
        raise typer.Exit(1)
