"""All layouts, and detection of a checkpoint's layout from headers and config.json. Does not import torch."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from quantlab.checkpoint.index import Checkpoint
from quantlab.errors import CheckpointError
from quantlab.files import read_json
from quantlab.formats import bitsandbytes, compressed_tensors, fp8_blocks, gptq
from quantlab.formats.layout import Dense, Description, Layout, Method
from quantlab.recipe.schemes import LayoutName

METHODS: Final[tuple[Method, ...]] = (compressed_tensors.METHOD, gptq.METHOD, fp8_blocks.METHOD, bitsandbytes.METHOD)
LAYOUTS: Final[Mapping[LayoutName, Layout]] = {
    layout.name: layout for layout in (Dense(), *(layout for method in METHODS for layout in method.layouts))
}
NUMBERS: Final[tuple[str, ...]] = tuple(dict.fromkeys(layout.parts[0] for layout in LAYOUTS.values()))
"""The name suffixes of tensors with quantized values; every weight has exactly one of them."""
OTHER_PARTS: Final[tuple[str, ...]] = tuple(
    f".{part}" for layout in LAYOUTS.values() for part in layout.parts if part not in NUMBERS
)


def logical_names(tensors: Iterable[str]) -> Iterator[str]:
    """Names of the weights: one per tensor, but one per weight for the tensors of a quantized weight."""
    for name in tensors:
        prefix, _, part = name.rpartition(".")
        if part in NUMBERS:
            yield f"{prefix}.weight"
        elif not name.endswith(OTHER_PARTS):
            yield name


def method_of_layout(name: LayoutName) -> Method:
    """The method whose description covers a quantized layout."""
    return next(method for method in METHODS if any(layout.name == name for layout in method.layouts))


def method_of(checkpoint: Checkpoint) -> Method | None:
    """The method a checkpoint is quantized by, None if it is not quantized.

    Raises:
        CheckpointError: it is quantized in a way quantlab does not read.
    """
    return _found(checkpoint)[0]


def description_of(checkpoint: Checkpoint) -> Description | None:
    """A checkpoint's description of its quantized weights, None if it is not quantized.

    Raises:
        ArtifactError: its numbers are of a kind quantlab does not read.
        CheckpointError: it is quantized in a way quantlab does not read.
    """
    method, described, where = _found(checkpoint)
    if method is not None:
        return method.parse(described, where)
    packed = next((name for name in checkpoint.tensors if name.endswith((".weight_packed", ".qweight"))), None)
    if packed is not None:
        raise CheckpointError(
            "the checkpoint contains packed integers but does not describe their format",
            where=where,
            found=f"{packed}, but no quantization_config",
            fix="use the config.json (or quantize_config.json) of the same release",
        )
    return None


def description_in(config: Mapping[str, Any], *, where: str) -> Description | None:
    """The description of quantized weights in config.json, None if there is none.

    Raises:
        ArtifactError, CheckpointError: as `description_of`.
    """
    described = config.get("quantization_config")
    return _method_called(described, where).parse(described, where) if described else None


def _found(checkpoint: Checkpoint) -> tuple[Method | None, Mapping[str, Any], str]:
    """Method, description and location of the description."""
    where = checkpoint.directory / "config.json"
    described = checkpoint.config.get("quantization_config") or {}
    if not described:
        for method in METHODS:
            packed = tuple(f".{layout.parts[0]}" for layout in method.layouts)
            beside = checkpoint.directory / method.file
            # the file may be left over beside weights that are not quantized
            if method.file and beside.is_file() and any(name.endswith(packed) for name in checkpoint.tensors):
                return method, read_json(beside), str(beside)
        return None, {}, str(where)
    return _method_called(described, str(where)), described, str(where)


def _method_called(described: Mapping[str, Any], where: str) -> Method:
    word = described.get("quant_method")
    found = next((method for method in METHODS if method.word == word), None)
    if found is None:
        raise CheckpointError(
            "the checkpoint is quantized in a way quantlab does not read",
            where=where,
            found=str(word),
            fix="use the original checkpoint; readable: not quantized, " + ", ".join(method.word for method in METHODS),
        )
    return found
