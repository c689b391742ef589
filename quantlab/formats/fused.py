"""Presents checkpoints with fused experts (transformers' layout) with one name per expert (DeepSeek's layout).

`experts.gate_up_proj` [E, 2I, H] contains for every expert the rows of gate, then those of up; `experts.down_proj` is
[E, H, I]. Packed weights and scales are fused in the same way. The matrix of one expert is a contiguous byte range of
its shard, so nothing is read or copied: the table of tensors gets an entry for every range.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Final

from quantlab.checkpoint.header import TensorEntry
from quantlab.checkpoint.index import Checkpoint

_FUSED: Final = re.compile(
    r"(?P<experts>.*\.mlp\.experts)\.(?P<kind>gate_up|down)_proj(?:[._](?P<part>weight|packed|weight_packed|scale|weight_scale|shape|weight_shape))?$"
)
_PARTS: Final = {"packed": "weight_packed", "scale": "weight_scale", "shape": "weight_shape", None: "weight"}


def unfused(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with an entry for every matrix of every expert; one without fused experts is returned as it is."""
    tensors: dict[str, TensorEntry] = {}
    for name, entry in checkpoint.tensors.items():
        match = _FUSED.match(name)
        if match is None:
            tensors[name] = entry
        else:
            tensors |= {part.name: part for part in _matrices(entry, **match.groupdict())}
    same = tensors.keys() == checkpoint.tensors.keys()
    return checkpoint if same else dataclasses.replace(checkpoint, tensors=tensors)


def _matrices(entry: TensorEntry, experts: str, kind: str, part: str | None) -> Iterator[TensorEntry]:
    part = _PARTS.get(part, part)
    if part == "weight_shape" or len(entry.shape) != 3:
        return  # it is the shape of the fused tensor; an expert's shape follows from its packed words
    names = ("gate_proj", "up_proj") if kind == "gate_up" else ("down_proj",)
    count, rows, columns = entry.shape
    shape = (rows // len(names), columns)
    nbytes = entry.nbytes // max(count * len(names), 1)
    for index in range(count):
        for position, name in enumerate(names):
            offset = entry.offset + (index * len(names) + position) * nbytes
            yield TensorEntry(f"{experts}.{index}.{name}.{part}", entry.dtype, shape, entry.file, offset)
