"""Writes the format `gguf` through the `gguf` package: header, keys and tensor table first, then one tensor at a time."""

from collections.abc import Mapping
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from quantlab.errors import ArtifactError
from quantlab.exports.gguf.metadata import Entry
from quantlab.exports.gguf.target import GgufPlan, plan_file
from quantlab.exports.gguf.tensors import ROTARY_DIVISORS, GgufTensor, HeadRows
from quantlab.exports.target import Progress
from quantlab.exports.writers.gguf_blocks import Rounded, block_bytes, float_bytes
from quantlab.exports.writers.writer import Written
from quantlab.files import write_error
from quantlab.formats.contents import Contents
from quantlab.formats.stored import StoredWeights
from quantlab.numerics.integer import QuantizedMatrix

FILE: Final = "model.gguf"
_INSTALL: Final = "pip install 'quantlab[gguf]'"


def write(artifact: StoredWeights, contents: Contents, directory: Path, progress: Progress) -> Written:
    """See `Write`. In memory is one tensor of the file at a time; the experts of a layer are one.

    Raises:
        ArtifactError: as `Write`, or the package `gguf` is not installed.
    """
    library, plan = _library(), plan_file(contents)
    scales, minima = Rounded(), Rounded()
    writer = _opened(library, plan, directory / FILE)
    progress(contents.elements - sum(tensor.elements for tensor in plan.tensors))  # left out
    try:
        if plan.divisors:
            writer.write_tensor_data(np.asarray(plan.divisors, np.float32))
        for tensor in plan.tensors:
            writer.write_tensor_data(_data(artifact, tensor, scales, minima))
            progress(tensor.elements)
    except OSError as error:
        raise write_error(directory / FILE, error) from error
    finally:
        writer.close()
    notes = (*plan.notes, *_rounding_notes("scales", scales), *_rounding_notes("minima", minima))
    return Written(notes, versions={"gguf": metadata.version("gguf")})


def _library() -> ModuleType:
    """The package `gguf`.

    Raises:
        ArtifactError: it is not installed.
    """
    try:
        return import_module("gguf")
    except ImportError as error:
        raise ArtifactError(
            "the package gguf is not installed", where="format gguf", found=str(error), fix=_INSTALL
        ) from error


def _opened(library: ModuleType, plan: GgufPlan, path: Path) -> Any:  # noqa: ANN401 - a GGUFWriter of an optional package
    """The writer of a file whose header, keys and tensor table are written.

    Raises:
        ArtifactError: the file cannot be written.
    """
    writer = library.GGUFWriter(path, plan.architecture)
    for entry in plan.entries:
        _add(library, writer, entry)
    if plan.divisors:
        writer.add_tensor_info(ROTARY_DIVISORS, (len(plan.divisors),), np.dtype(np.float32), 4 * len(plan.divisors))
    for tensor in plan.tensors:
        kind = library.GGMLQuantizationType[tensor.type]
        nbytes = int(np.prod(tensor.byte_shape))
        writer.add_tensor_info(tensor.name, tensor.byte_shape, np.dtype(np.uint8), nbytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    except OSError as error:
        raise write_error(path, error) from error
    return writer


def _add(library: ModuleType, writer: Any, entry: Entry) -> None:  # noqa: ANN401
    types = library.GGUFValueType
    kinds: Mapping[str, tuple[Any, ...]] = {
        "string": (types.STRING,),
        "uint32": (types.UINT32,),
        "float32": (types.FLOAT32,),
        "bool": (types.BOOL,),
        "strings": (types.ARRAY, types.STRING),
        "int32s": (types.ARRAY, types.INT32),
        "float32s": (types.ARRAY, types.FLOAT32),
    }
    value = list(entry.value) if isinstance(entry.value, tuple) else entry.value
    writer.add_key_value(entry.key, value, *kinds[entry.kind])


def _data(artifact: StoredWeights, tensor: GgufTensor, scales: Rounded, minima: Rounded) -> np.ndarray[Any, Any]:
    """The bytes of a tensor of the file.

    Raises:
        ArtifactError, CheckpointError: a weight cannot be read, or a scale is too large.
    """
    rows = None if tensor.rows is None else torch.tensor(tensor.rows.indices())
    stacked = torch.empty(tensor.byte_shape, dtype=torch.uint8)
    parts = stacked if len(tensor.sources) > 1 else stacked[None]
    for part, name in zip(parts, tensor.sources, strict=True):
        weight = _rows_of(artifact.read(name), rows)
        if isinstance(weight, QuantizedMatrix) and not tensor.transposed and tensor.type.startswith("Q"):
            made = block_bytes(weight, tensor.type, name, scales=scales, minima=minima)
        else:
            dense = weight.dequantize(weight.scale.dtype) if isinstance(weight, QuantizedMatrix) else weight
            made = float_bytes(_transposed(dense, tensor.rows) if tensor.transposed else dense, tensor.type)
        part.copy_(made.view(part.shape))
    return stacked.numpy()


def _rows_of(weight: Tensor | QuantizedMatrix, rows: Tensor | None) -> Tensor | QuantizedMatrix:
    """Some rows of a weight, with their scales and zero points."""
    if rows is None:
        return weight
    if isinstance(weight, Tensor):
        return weight[rows]
    zero = None if weight.zero is None else weight.zero[rows]
    return QuantizedMatrix(weight.q[rows], weight.scale[rows], weight.bits, zero)


def _transposed(dense: Tensor, rows: HeadRows | None) -> Tensor:
    """[H n, R] with n chosen rows of each of H heads as [H, R, n]."""
    assert rows is not None, "heads are transposed one by one"
    return dense.view(rows.heads, len(rows.order), -1).transpose(1, 2)


def _rounding_notes(what: str, rounded: Rounded) -> tuple[str, ...]:
    if not rounded.inexact:
        return ()
    share = f"{rounded.inexact:,} of {rounded.numbers:,} {what}"
    return (
        f"{share} are not exact in float16, in which GGUF stores them (largest relative error {rounded.largest:.2g})",
    )
