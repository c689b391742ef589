"""Writes checkpoints: config.json, shards with their index, and the companion files of an artifact."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from quantlab.checkpoint.index import INDEX_NAME
from quantlab.checkpoint.writer import ShardWriter
from quantlab.exports.target import Progress
from quantlab.files import read_json, write_atomically, write_error
from quantlab.formats.contents import Weight
from quantlab.formats.layout import StoredTensor, stored_bytes

LARGEST_SHARD: Final = 5_000_000_000
"""Bytes; a weight that is larger has a shard of its own."""

Planned = tuple[Weight, tuple[StoredTensor, ...]]
"""A weight and the tensors that store it, in order."""


def write_shards(
    directory: Path, planned: Sequence[Planned], produce: Callable[[Weight], Mapping[str, Tensor]], progress: Progress
) -> dict[str, str]:
    """Write weights as shards with their index, one weight in memory at a time.

    Args:
        directory: an existing directory.
        planned: all weights, in order.
        produce: makes the tensors of a weight, by name and in the planned order.
        progress: called after each weight with its number of elements.

    Returns:
        The sha256 of every shard by its name.

    Raises:
        ArtifactError: a file cannot be written.
    """
    shards = list(_shards(planned))
    hashes: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = [tensor for _, stored in shard for tensor in stored]
        with ShardWriter(directory / file, tensors) as writer:
            for weight, _ in shard:
                for name, tensor in produce(weight).items():
                    writer.write(name, tensor)
                progress(weight.elements)
        hashes[file] = writer.sha256
        weight_map |= {name: file for name, _, _ in tensors}
        total += sum(map(stored_bytes, tensors))
    write_json(directory / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return hashes


def carry_companions(artifact: Path, directory: Path) -> None:
    """Copy tokenizer, templates, licence and the other files of an artifact besides its weights and their description.

    Raises:
        ArtifactError: a file cannot be copied.
    """
    for name in read_json(artifact / "manifest.json")["files"]:
        if name in {"config.json", INDEX_NAME} or name.endswith(".safetensors"):
            continue
        try:
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(artifact / name, directory / name)
        except OSError as error:
            raise write_error(directory / name, error) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file of a checkpoint.

    Raises:
        ArtifactError: it cannot be written.
    """
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _shards(planned: Sequence[Planned]) -> Iterator[list[Planned]]:
    """Consecutive weights of at most `LARGEST_SHARD` bytes together."""
    shard: list[Planned] = []
    size = 0
    for weight, tensors in planned:
        nbytes = sum(map(stored_bytes, tensors))
        if shard and size + nbytes > LARGEST_SHARD:
            yield shard
            shard, size = [], 0
        shard.append((weight, tensors))
        size += nbytes
    yield shard
