"""The dtype of a checkpoint: what config.json says, else what most of its weights have. Does not import torch.

config.json spells it `dtype` or `torch_dtype`, as "bfloat16" or "torch.bfloat16"; "auto" leaves it to the weights.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from quantlab.checkpoint.header import TensorEntry
from quantlab.checkpoint.index import Checkpoint
from quantlab.errors import ArtifactError
from quantlab.formats.layouts import OTHER_PARTS

_FIELDS: Final = ("dtype", "torch_dtype")
_WORDS: Final[Mapping[str, str]] = {
    "float16": "float16", "half": "float16",
    "bfloat16": "bfloat16",
    "float32": "float32", "float": "float32",
    "float64": "float32", "double": "float32",
}  # fmt: skip
"""The dtype that models compute in, at most float32, by torch's words."""
_OF_WEIGHTS: Final[Mapping[str, str]] = {
    "F16": "F16", "BF16": "BF16", "F32": "F32", "F64": "F64", "F8_E4M3": "BF16",
}  # fmt: skip
"""The dtype word of the values of floating-point weights; FP8 is expanded to bfloat16."""
_TORCH_WORDS: Final[Mapping[str, str]] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def dtype_of(checkpoint: Checkpoint) -> str:
    """The dtype of activations and unquantized weights of a checkpoint: "float16", "bfloat16" or "float32".

    Raises:
        ArtifactError: config.json names a dtype that models do not compute in.
    """
    where = str(checkpoint.directory / "config.json")
    stated = stated_dtype(checkpoint.config, where=where)
    return stated or _WORDS[dtype_of_weights(checkpoint.tensors.values())]


def stated_dtype(config: Mapping[str, Any], *, where: str) -> str | None:
    """The dtype that config.json names, None if it leaves it to the weights.

    Raises:
        ArtifactError: it names a dtype that models do not compute in.
    """
    for field in _FIELDS:
        value = config.get(field)
        word = str(value).removeprefix("torch.")
        if value is None or word == "auto" or word.startswith("float8"):  # FP8 is expanded, whatever its name
            continue
        if word not in _WORDS:
            raise ArtifactError(
                "the checkpoint's dtype is unknown",
                where=f"{where}, {field}",
                found=repr(value),
                fix="known: " + ", ".join(dict.fromkeys(_WORDS.values())) + "; without the field, that of the weights",
            )
        return _WORDS[word]
    return None


def dtype_of_weights(entries: Iterable[TensorEntry]) -> str:
    """The dtype of most bytes of the floating-point weights, as torch spells it; scales do not count.

    A checkpoint without such weights counts as bfloat16.
    """
    bytes_of = dict.fromkeys(_TORCH_WORDS, 0)
    for entry in entries:
        word = _OF_WEIGHTS.get(entry.dtype)
        if word is not None and not entry.name.endswith(OTHER_PARTS):
            bytes_of[word] += entry.nbytes
    most = max(bytes_of, key=lambda word: bytes_of[word])
    return _TORCH_WORDS[most] if bytes_of[most] else "bfloat16"
