"""The commands that check artifacts and install the engines that judge them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from quantlab import console as show

QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and no tables.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output, nothing else.")]

engines = typer.Typer(rich_markup_mode="markdown")

_out = Console()
_err = Console(stderr=True)


def verify(  # noqa: PLR0913 - options of a command
    artifact: Annotated[
        Path, typer.Argument(help="A directory under runs/NAME/artifacts, or an export of one.", show_default=False)
    ],
    engine: Annotated[
        list[str] | None,
        typer.Option(help="Load it with this engine too and compare; may be repeated. See `quantlab engines`."),
    ] = None,
    engine_python: Annotated[
        list[str] | None, typer.Option(help="The Python that runs an engine.", metavar="ENGINE=PATH")
    ] = None,
    source: Annotated[
        Path | None, typer.Option(help="The source model, run first in every engine.", show_default="from the manifest")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the engines: float32, bfloat16, float16.")] = "float32",
    tokens: Annotated[int, typer.Option(min=100, help="Tokens that engines compute.")] = 2000,
    time_limit: Annotated[
        float | None,
        typer.Option(min=1, help="End an engine after this many seconds.", metavar="SECONDS", show_default="1800"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check an artifact: hashes, ledger, finite values, equal logits in transformers and quantlab's runtime; then engines."""
    from quantlab.evaluation.engines.judge import Judging
    from quantlab.evaluation.engines.options import engine_names, pythons_of
    from quantlab.evaluation.engines.record_verdicts import judge_directory
    from quantlab.evaluation.verify import verify as checks

    names, pythons = engine_names(engine or (), dtype), pythons_of(engine_python or ())
    results = []
    for check in checks(artifact):
        results.append(check)
        if not as_json:
            show.print_check(_out, check.name, check.verdict, check.detail)
    verdicts = []
    damaged = results[0].verdict == "failed"  # an engine would judge other files than the artifact's
    with _err.status("engines") as status:
        how = Judging(
            dtype=dtype, tokens=tokens, seconds=time_limit, pythons=pythons, source=source, tell=status.update
        )
        for verdict in () if damaged or not names else judge_directory(artifact, names, how):
            verdicts.append(verdict)
            if not as_json:
                show.print_verdict(_out, verdict)
    if as_json:
        found = [asdict(check) for check in results]
        told = {"checks": found, "engines": [one.model_dump(mode="json") for one in verdicts]} if names else found
        typer.echo(json.dumps(told, indent=1))
    elif verdicts:
        text = "verdicts.json beside the manifest has the verdicts; `quantlab report` brings them into matrix and model card"
        _err.print(text, style="dim", highlight=False, markup=False)
    if any(check.verdict == "failed" for check in results) or any(verdict.fails for verdict in verdicts):
        raise typer.Exit(1)


@engines.callback(invoke_without_command=True)
def list_engines(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the engines that can judge artifacts, and the Python that runs each."""
    if context.invoked_subcommand is not None:
        return
    from quantlab.evaluation.engines.options import described_engines

    rows = described_engines()
    if as_json:
        typer.echo(json.dumps([dict(zip(("engine", "version", "python", "reads"), row, strict=True)) for row in rows]))
    else:
        _out.print(show.engines_table(rows))


@engines.command("install")
def install_engine(
    engine: Annotated[str, typer.Argument(help="The engine.", show_default=False)], quiet: QuietOption = False
) -> None:
    """Install an engine in an environment of its own, in the user's cache, with the versions that were tested."""
    from quantlab.evaluation.engines.engine import ENGINES
    from quantlab.evaluation.engines.environments import install
    from quantlab.evaluation.engines.options import engine_names

    def tell(line: str) -> None:
        if not quiet:
            _err.print(line, style="dim", highlight=False, markup=False)

    (name,) = engine_names((engine,))
    python = install(ENGINES[name], tell)
    _out.print(f"{name}: {python}", highlight=False, markup=False, soft_wrap=True)
