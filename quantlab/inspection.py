"""Shows the contents of a checkpoint, quantized or not."""

import json
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console

from quantlab import console as show
from quantlab.architectures.architecture import Architecture
from quantlab.architectures.config import size_of
from quantlab.architectures.detect import detect
from quantlab.checkpoint.index import Checkpoint
from quantlab.formats.layouts import description_of, method_of
from quantlab.formats.understood import understood
from quantlab.plan.source import survey
from quantlab.source import open_model


def inspect_checkpoint(directory: Path, out: Console, *, as_json: bool) -> None:
    """Print family, roles, dtypes or schemes, parameters and bytes, from headers alone.

    Args:
        directory: of the checkpoint, or the id of a model on the hub.
        out: where tables are printed.
        as_json: print JSON on standard output instead.

    Raises:
        ArtifactError, CheckpointError: the checkpoint cannot be read.
    """
    opened = understood(open_model(directory))
    architecture = detect(opened.config)
    method = method_of(opened)
    if method is not None and not method.is_source:
        _inspect_quantized(opened, architecture, out, as_json=as_json)
        return
    weights = survey(opened, architecture)
    if as_json:
        tensors = [
            {
                "tensor": weight.entry.name,
                "role": weight.tensor.role,
                "dtype": weight.entry.dtype,
                "shape": weight.entry.shape,
                "file": weight.entry.file.name,
            }
            for weight in weights
        ]
        typer.echo(json.dumps({"architecture": architecture.class_name, "tensors": tensors}, indent=1))
        return
    numbers = description_of(opened)
    quantized = f", {numbers}" if numbers else ""
    out.print(f"{architecture.class_name} in {len(opened.files)} files{quantized}", highlight=False, markup=False)
    out.print(show.checkpoint_table(weights))


def _inspect_quantized(checkpoint: Checkpoint, architecture: Architecture, out: Console, *, as_json: bool) -> None:
    """Print the contents of a quantized checkpoint, made by quantlab or by another tool."""
    from quantlab.checkpoint.reader import Reader  # imports torch
    from quantlab.formats.stored import StoredWeights

    stored = StoredWeights(Reader(checkpoint))
    layers = size_of(checkpoint.config, "num_hidden_layers")
    weights = [(architecture.classify(held.name, hidden_layers=layers).role, held) for held in stored.contents()]
    if as_json:
        tensors = [{"role": role} | asdict(held) for role, held in weights]
        content = {"architecture": architecture.class_name, "quantization": stored.method, "tensors": tensors}
        typer.echo(json.dumps(content, indent=1))
        return
    schemes = "; ".join(dict.fromkeys(held.description for _, held in weights if held.description))
    text = f"{architecture.class_name} in {len(checkpoint.files)} files, {stored.method}: {schemes}"
    out.print(text, highlight=False, markup=False)
    out.print(show.contents_table((role, held.numbers, held.parameters, held.nbytes) for role, held in weights))
