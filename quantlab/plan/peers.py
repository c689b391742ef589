"""Peers of a recipe: the same model as another tool wrote it. Their headers are checked before any work."""

from collections.abc import Mapping
from typing import Any

from quantlab.architectures.detect import detect
from quantlab.checkpoint.index import Checkpoint
from quantlab.errors import PlanError
from quantlab.files import read_json
from quantlab.formats import bitsandbytes
from quantlab.formats.contents import DENSE, Contents
from quantlab.formats.read_contents import contents_of
from quantlab.formats.understood import understood
from quantlab.plan.model import Peer

_MAY_BE_FEWER = frozenset({"experts", "mtp_layers"})
"""Sizes that a tool may have reduced: it removed experts, or left out multi-token-prediction layers."""


def check_peer(name: str, peer: Checkpoint, source: Checkpoint) -> Peer:
    """Check that a directory has the model of the source, in a layout that the runtime reads.

    Args:
        name: name of its row.
        peer: its config and headers.
        source: the recipe's model.

    Raises:
        ArtifactError: its numbers are of a kind quantlab does not read, or its tensors contradict its config.json.
        CheckpointError: its config.json cannot be right, or it is quantized in a way quantlab does not read.
        PlanError: it is another model, or a tensor is missing or has the wrong shape.
    """
    peer = understood(peer)
    _check_same_model(name, peer, source)
    contents = contents_of(peer)
    _check_complete(name, peer, contents)
    producer = producer_of(peer)
    return Peer(name, peer, _description(contents, producer), contents.method, producer)


def producer_of(checkpoint: Checkpoint) -> str:
    """The program that wrote a checkpoint, with its version, as far as its files name it; empty if they do not.

    GPTQModel names itself in `meta.quantizer`, auto-round has fields of its own, llm-compressor leaves its recipe.yaml and the
    version of compressed-tensors, quantlab a manifest.
    """
    manifest = checkpoint.directory / "manifest.json"
    versions = read_json(manifest).get("versions") if manifest.is_file() else None
    if isinstance(versions, Mapping) and "quantlab" in versions:
        return f"quantlab {versions['quantlab']}"
    described: Mapping[str, Any] = checkpoint.config.get("quantization_config") or {}
    meta = described.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, Mapping) else None
    first = quantizer[0] if isinstance(quantizer, list) and quantizer else quantizer
    if isinstance(first, str) and first:
        return first.replace(":", " ", 1)
    if "autoround_version" in described:
        return f"auto-round {described['autoround_version']}"
    if described.get("quant_method") == "compressed-tensors" and described.get("version"):
        tool = "llm-compressor, " if (checkpoint.directory / "recipe.yaml").is_file() else ""
        return f"{tool}compressed-tensors {described['version']}"
    return ""


def _description(contents: Contents, producer: str) -> str:
    formats = dict.fromkeys(weight.scheme for weight in contents.quantized)
    dtypes = dict.fromkeys(weight.dtype for weight in contents.weights)
    numbers = ", ".join(formats or dtypes)
    written = "not quantized" if contents.method == DENSE else f"as {contents.method}"
    if contents.method == bitsandbytes.METHOD.word and any(one.layout == "bnb-int8" for one in contents.quantized):
        rounds = any(one.number and one.number.activations for one in contents.quantized)
        written += "" if rounds else ", whose activations are not rounded here"
    return f"another tool's {numbers}, {written}; by {producer or 'a program that its files do not name'}"


def _check_same_model(name: str, peer: Checkpoint, source: Checkpoint) -> None:
    """Compare families and sizes; other fields of config.json are the tool's own business."""
    architecture = detect(peer.config)
    where, fix = str(peer.directory / "config.json"), "give a directory that a tool made from the recipe's `model`"
    if architecture.name != detect(source.config).name:
        raise PlanError(
            f"the peer {name} is another model",
            where=where,
            found=f"model_type {architecture.name}, the recipe's model is {detect(source.config).name}",
            fix=fix,
        )
    ours, theirs = architecture.dimensions(source.config), architecture.dimensions(peer.config)
    for size, wanted in ours.items():
        found = theirs.get(size)
        if found != wanted and not (size in _MAY_BE_FEWER and found is not None and found < wanted):
            raise PlanError(
                f"the peer {name} is another model",
                where=where,
                found=f"{size} {found}, the recipe's model has {wanted}",
                fix=fix,
            )


def _check_complete(name: str, peer: Checkpoint, contents: Contents) -> None:
    """Check that every tensor of the model is there, quantized or not, with its shape."""
    shapes = {weight.name: weight.shape for weight in contents.weights}
    for expected, shape in contents.architecture.expected(peer.config, with_mtp=False):
        rule = contents.architecture.classify(expected, hidden_layers=0).rule
        found = shapes.get(expected)
        if found == shape or (found is None and rule is not None and rule.optional):
            continue
        if found is not None and _fills_words(found, shape):
            continue
        raise PlanError(
            f"a tensor of the peer {name} is missing"
            if found is None
            else f"a tensor of the peer {name} has another shape",
            where=f"{peer.directory}, {expected}",
            found="no such tensor" if found is None else f"{list(found)}, its config.json says {list(shape)}",
            fix="give the whole directory that the tool wrote",
        )


def _fills_words(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether columns were only rounded up to whole words of packed integers."""
    return len(found) == len(shape) == 2 and found[0] == shape[0] and 0 <= found[1] - shape[1] < 8
