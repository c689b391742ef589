"""The command that lists what comes with quantlab."""

import json
from typing import get_args

import typer
from rich.console import Console
from rich.table import Table

from quantlab.engine_commands import JsonOption
from quantlab.shipped import Kind, description, names

_HEADINGS: dict[Kind, str] = {
    "recipe": "recipes: quantlab run NAME",
    "suite": "suites: `evaluate: {suite: NAME}`",
    "corpus": "corpora: `calibration: {corpus: NAME}`",
    "claims": "claims: `evaluate: {claims: NAME}`",
    "model": "models: `model: NAME`",
}


def recipes(as_json: JsonOption = False) -> None:
    """List the recipes, suites, corpora and claims that come with quantlab, which recipes and commands know by name."""
    listed = {
        kind: {name: {"path": str(path), "description": description(path, kind)} for name, path in names(kind).items()}
        for kind in get_args(Kind)
    }
    if as_json:
        typer.echo(json.dumps(listed, indent=1))
        return
    console = Console()
    for kind, heading in _HEADINGS.items():
        table = Table("name", "description", title=heading, title_justify="left", box=None, pad_edge=False)
        for name, one in listed[kind].items():
            table.add_row(name, one["description"])
        console.print(table, "")
