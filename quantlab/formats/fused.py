"""Presents checkpoints with fused experts (transformers' layout) with one name per expert (DeepSeek's layout).

`experts.gate_up_proj` [E, 2I, H] contains for every expert the rows of gate, then those of up; `experts.down_proj` is
[E, H, I]. Packed weights and scales are fused in the same way, scales of FP8 blocks if no block has rows of both gate
and up. The matrix of one expert is a contiguous byte range of its shard, so nothing is read or copied: the table of
tensors gets an entry for every range.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Final

from quantlab.checkpoint.header import TensorEntry
from quantlab.checkpoint.index import Checkpoint
from quantlab.errors import CheckpointError

_FUSED: Final = re.compile(
    r"(?P<experts>.*\.mlp\.experts)\.(?P<kind>gate_up|down)_proj(?:[._](?P<part>weight|packed|weight_packed|scale|weight_scale|scale_inv|weight_scale_inv|shape|weight_shape))?$"
)
_PARTS: Final = {
    "packed": "weight_packed",
    "scale": "weight_scale",
    "scale_inv": "weight_scale_inv",
    "shape": "weight_shape",
    None: "weight",
}


def unfused(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with an entry for every matrix of every expert; one without fused experts is returned as it is.

    Raises:
        CheckpointError: a fused tensor cannot be divided into the matrices of experts.
    """
    tensors: dict[str, TensorEntry] = {}
    for name, entry in checkpoint.tensors.items():
        match = _FUSED.match(name)
        if match is None:
            tensors[name] = entry
        else:
            _check_blocks(checkpoint, entry, **match.groupdict())
            tensors |= {part.name: part for part in _matrices(entry, **match.groupdict())}
    same = tensors.keys() == checkpoint.tensors.keys()
    return checkpoint if same else dataclasses.replace(checkpoint, tensors=tensors)


def _matrices(entry: TensorEntry, experts: str, kind: str, part: str | None) -> Iterator[TensorEntry]:
    part = _PARTS.get(part, part)
    if part == "weight_shape":
        return  # it is the shape of the fused tensor; an expert's shape follows from its packed words
    names = ("gate_proj", "up_proj") if kind == "gate_up" else ("down_proj",)
    if len(entry.shape) != 3 or entry.shape[1] % len(names):
        raise _indivisible(entry, f"{list(entry.shape)}, not [experts, {'2 x ' * (len(names) - 1)}rows, columns]")
    count, rows, columns = entry.shape
    shape = (rows // len(names), columns)
    nbytes = entry.nbytes // max(count * len(names), 1)
    for index in range(count):
        for position, name in enumerate(names):
            offset = entry.offset + (index * len(names) + position) * nbytes
            yield TensorEntry(f"{experts}.{index}.{name}.{part}", entry.dtype, shape, entry.file, offset)


def _check_blocks(checkpoint: Checkpoint, entry: TensorEntry, experts: str, kind: str, part: str | None) -> None:
    """Refuse scales of FP8 blocks that have rows of both gate and up: they cannot be divided between the two."""
    if _PARTS.get(part, part) != "weight_scale_inv" or kind != "gate_up":
        return
    names = (f"{experts}.gate_up_proj", f"{experts}.gate_up_proj.weight")
    weight = next((checkpoint.tensors[name] for name in names if name in checkpoint.tensors), None)
    size = (checkpoint.config.get("quantization_config") or {}).get("weight_block_size")
    rows = size[0] if isinstance(size, list) and size and isinstance(size[0], int) and size[0] > 0 else 1
    if weight is not None and len(weight.shape) == 3 and weight.shape[1] // 2 % rows:
        raise _indivisible(entry, f"blocks of {rows} rows over {weight.shape[1] // 2} rows of gate and as many of up")


def _indivisible(entry: TensorEntry, found: str) -> CheckpointError:
    return CheckpointError(
        "fused experts cannot be divided into the matrices of single experts",
        where=f"{entry.file}, {entry.name}",
        found=found,
        fix="save the checkpoint with one tensor per expert (`experts.0.gate_proj.weight` …), as DeepSeek releases it",
    )
