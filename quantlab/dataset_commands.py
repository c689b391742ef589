"""The command on datasets: the short names that recipes and suites may use."""

import json
from dataclasses import asdict

import typer
from rich.console import Console

from quantlab import console as show
from quantlab.engine_commands import JsonOption
from quantlab.recipe.presets import PRESETS


def datasets(as_json: JsonOption = False) -> None:
    """List the datasets that recipes and suites can name by a short word, with the commits they are pinned to."""
    if as_json:
        typer.echo(json.dumps({name: asdict(preset) for name, preset in PRESETS.items()}, indent=1))
    else:
        show.print_presets(Console(), PRESETS)
