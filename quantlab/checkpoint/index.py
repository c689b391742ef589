"""A checkpoint directory as one table of tensors, read from headers alone."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantlab.checkpoint.header import TensorEntry
from quantlab.checkpoint.shards import LocalShards, Shards
from quantlab.checkpoint.unindexed import check_whole, complete_set, merged_shards
from quantlab.errors import CheckpointError
from quantlab.files import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A directory of safetensors with its config.json.

    Attributes:
        directory: its path.
        config: contents of config.json.
        tensors: every tensor by name.
        shards: the files that hold them.
    """

    directory: Path
    config: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, TensorEntry] = field(repr=False)
    shards: Shards = field(repr=False, compare=False)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted({entry.file for entry in self.tensors.values()}))

    def fingerprint(self) -> str:
        """sha256 of config.json and of every tensor's name, dtype, shape, file and offset.

        It identifies the checkpoint without reading its weights, so it does not detect weights edited in place.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.tensors):
            entry = self.tensors[name]
            digest.update(f"{name} {entry.dtype} {entry.shape} {entry.file.name} {entry.offset}\n".encode())
        return digest.hexdigest()


def open_checkpoint(directory: Path, shards: Shards | None = None) -> Checkpoint:
    """Read the config and every header of a checkpoint.

    Args:
        directory: with config.json, the index and the small files.
        shards: the files with the weights; by default those of the directory.

    Raises:
        CheckpointError: the directory or its safetensors are missing, index and shards contradict each other, or the
            index and a single file hold different weights.
    """
    if not directory.is_dir():
        raise CheckpointError(
            "the checkpoint directory does not exist",
            where=str(directory),
            found="nothing" if not directory.exists() else "a file",
            fix="give the path of a directory with config.json and *.safetensors",
        )
    check_whole(directory)
    config = read_json(directory / "config.json")
    quantization = config.get("quantization_config")
    if quantization is not None and not (
        isinstance(quantization, dict) and isinstance(quantization.get("quant_method"), str)
    ):
        raise CheckpointError(
            "config.json has no usable quantization_config",
            where=str(directory / "config.json"),
            found=repr(quantization)[:120],
            fix="use the config.json of the original release",
        )
    shards = shards or LocalShards(directory)
    return Checkpoint(directory, config, _tensors(directory, shards), shards)


def _tensors(directory: Path, shards: Shards) -> dict[str, TensorEntry]:
    """The tensors of the index, of the single file, or of a complete set of shards."""
    names = shards.names()
    if (directory / INDEX_NAME).is_file():
        tensors = _indexed_tensors(directory, shards, names)
        others = sorted({entry.file.name for entry in tensors.values()} - {SINGLE_NAME})
        if SINGLE_NAME in names and others:
            raise CheckpointError(
                f"the directory holds two sets of weights: {SINGLE_NAME}, and the shards of {INDEX_NAME}",
                where=str(directory),
                found=f"{SINGLE_NAME} beside {others[0]}" + (f" and {len(others) - 1} more" if others[1:] else ""),
                fix=f"delete one of them: transformers would read {SINGLE_NAME}, other engines the index",
            )
        return tensors
    if SINGLE_NAME in names:
        return shards.header(SINGLE_NAME)
    return merged_shards(shards, complete_set(directory, names))


def _indexed_tensors(directory: Path, shards: Shards, names: Collection[str]) -> dict[str, TensorEntry]:
    weight_map = read_json(directory / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(
            "the index has no usable weight_map",
            where=str(directory / INDEX_NAME),
            found=type(weight_map).__name__,
            fix="download the index again",
        )
    files = sorted(set(weight_map.values()))
    for file in files:
        _check_shard(directory, file, names)
    headers = {file: shards.header(file) for file in files}
    tensors: dict[str, TensorEntry] = {}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise CheckpointError(
                "a tensor of the index is missing from its shard",
                where=f"{directory / file}",
                found=f"no {name}",
                fix="download the shard again",
            )
        tensors[name] = headers[file][name]
    for file, header in headers.items():
        for name in header:
            if name not in weight_map:
                raise CheckpointError(
                    "a shard contains a tensor that the index does not list",
                    where=str(directory / file),
                    found=name,
                    fix="download the index and the shards of one release",
                )
            if weight_map[name] != file:
                raise CheckpointError(
                    "two shards hold the same tensor",
                    where=str(directory / file),
                    found=f"{name}, which the index takes from {weight_map[name]}",
                    fix="download the index and the shards of one release",
                )
    return tensors


def _check_shard(directory: Path, file: str, names: Collection[str]) -> None:
    """Refuse a shard named in the index that is not a plain file name, or not there."""
    if Path(file).name != file or file in {"", ".", ".."}:
        raise CheckpointError(
            "the index names a file outside the checkpoint",
            where=str(directory / INDEX_NAME),
            found=repr(file),
            fix="shards must be in the directory of the index; download it from the original release",
        )
    if file not in names:
        raise CheckpointError(
            "a shard is missing", where=str(directory / file), found="no such file", fix="download the shard"
        )
