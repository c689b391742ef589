"""Directories without an index: a complete set of shards is read, everything else is named for what it is.

Shards are called `<name>-00001-of-00004.safetensors`. A set of them is complete if every number from 1 to the last is
there once.
"""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from quantlab.checkpoint.header import TensorEntry
from quantlab.checkpoint.shards import Shards
from quantlab.errors import CheckpointError

_SHARD: Final = re.compile(r"(?P<name>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ADAPTER: Final = "adapter_config.json"
_READ: Final = (".safetensors", ".json")


def check_whole(directory: Path) -> None:
    """Refuse a directory whose weights or descriptions are not there, with what it holds instead.

    Raises:
        CheckpointError: a file is a link to nothing, or the directory holds an adapter without a model.
    """
    for path in sorted(directory.iterdir()):
        if path.is_symlink() and not path.exists() and path.suffix in _READ:
            raise CheckpointError(
                "a file of the checkpoint is a link to a file that does not exist",
                where=str(path),
                found=f"{path.readlink()} is gone",
                fix="download the checkpoint again, or delete the link",
            )
    models = [path for path in directory.glob("*.safetensors") if not path.name.startswith("adapter_")]
    if (directory / _ADAPTER).is_file() and not models:
        raise CheckpointError(
            "the directory holds an adapter (LoRA), not a model",
            where=str(directory),
            found=_ADAPTER,
            fix="merge it into its base model (`merge_and_unload` of peft), save that, and give its directory",
        )


def complete_set(directory: Path, names: Collection[str]) -> list[str]:
    """The shards of a directory without an index and without a single file, in order.

    Args:
        directory: of the checkpoint.
        names: of its safetensors files.

    Raises:
        CheckpointError: there is no complete set of them, or more than one.
    """
    found = sorted(names)
    matches = [(name, match) for name in found if (match := _SHARD.fullmatch(name))]
    sets = sorted({(match["name"], int(match["count"])) for _, match in matches})
    if len(sets) != 1:
        raise _no_weights(directory, found)
    ((_, count),) = sets
    numbers = sorted(int(match["number"]) for _, match in matches)
    first = range(1, min(count, len(numbers) + 6) + 1)  # a damaged name may claim any count
    missing = [number for number in first if number not in numbers]
    if missing or len(numbers) != count:
        named = ", ".join(str(number) for number in missing[:5]) + (" …" if missing[5:] else "")
        raise CheckpointError(
            "shards are missing, and there is no index",
            where=str(directory),
            found=f"{len(numbers)} of {count} shards, "
            + (f"without number {named}" if missing else "one of them twice"),
            fix="download the missing shards, and the index model.safetensors.index.json",
        )
    return [name for name, _ in sorted(matches, key=lambda pair: int(pair[1]["number"]))]


def merged_shards(shards: Shards, names: Sequence[str]) -> dict[str, TensorEntry]:
    """The tensors of all shards of a set.

    Raises:
        CheckpointError: a shard is damaged, or two of them hold a tensor of the same name.
    """
    tensors: dict[str, TensorEntry] = {}
    for shard in names:
        header = shards.header(shard)
        for name in header.keys() & tensors.keys():
            raise CheckpointError(
                "two shards hold the same tensor, and there is no index that chooses",
                where=str(shards.directory / shard),
                found=f"{name}, also in {tensors[name].file.name}",
                fix="download the index model.safetensors.index.json of the same release",
            )
        tensors |= header
    return tensors


def _no_weights(directory: Path, found: Sequence[str]) -> CheckpointError:
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if found:
        return CheckpointError(
            "the directory contains safetensors files, but not those of a model",
            where=str(directory),
            found=_listed(found),
            fix="a model is model.safetensors, or shards with model.safetensors.index.json or with names "
            "<name>-00001-of-00004.safetensors; rename a single file to model.safetensors",
        )
    if pickles:
        return CheckpointError(
            "only safetensors files are supported: a pickle can run code when it is loaded",
            where=str(directory),
            found=_listed(pickles),
            fix='convert once, on a machine you trust with it: python -c "import transformers as t; '
            f"t.AutoModelForCausalLM.from_pretrained('{directory}', dtype='auto').save_pretrained('{directory}-safetensors')\"",
        )
    return CheckpointError(
        "the directory contains no safetensors files",
        where=str(directory),
        found=_listed(sorted(path.name for path in directory.iterdir())),
        fix="download the weights of the checkpoint",
    )


def _listed(names: Sequence[str]) -> str:
    return (", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")) or "nothing"
