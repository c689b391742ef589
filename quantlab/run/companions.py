"""The files of the source beside its weights: tokenizer, templates, remote code, licence, notices.

An artifact carries all of them, under the same names. What would be wrong beside other weights, or is no part of the
model, is left out, and the manifest names it with the reason.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quantlab.checkpoint.index import INDEX_NAME

TEMPLATES: Final = "additional_chat_templates"
"""The only folder that belongs to a checkpoint: the chat templates beside the default one."""
_LARGEST: Final = 100_000_000
_WRITTEN_ANEW: Final = frozenset({"config.json", INDEX_NAME})
_REASONS: Final[Mapping[str, str]] = {
    "README.md": "the artifact has a model card of its own",
    "manifest.json": "the artifact has a manifest of its own",
    "verdicts.json": "engines judged other weights",
    "export.json": "it describes other files",
    "quantize_config.json": "it describes another quantization",
    "quant_config.json": "it describes another quantization",
    "hf_quant_config.json": "it describes another quantization",
    "adapter_config.json": "an adapter is no part of the model",
}
_TENSORS: Final = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot"}
    | {".npz", ".npy", ".pkl", ".tflite"}
)


@dataclass(frozen=True)
class Companions:
    """The files of a source beside its weights.

    Attributes:
        carried: their paths in the source, relative, with "/".
        left_out: those that an artifact does not carry, with the reason.
    """

    carried: tuple[str, ...]
    left_out: Mapping[str, str]


def companions(source: Path, weights: Collection[str]) -> Companions:
    """The files of a source directory that an artifact carries, and those it leaves out.

    Args:
        source: directory of the source.
        weights: names of the files with its weights.
    """
    carried, left_out = [], {}
    for path in _entries(source):
        name = path.relative_to(source).as_posix()
        if name in _WRITTEN_ANEW or name in weights:
            continue
        reason = _reason(path, name)
        if reason is None:
            carried.append(name)
        else:
            left_out[name] = reason
    return Companions(tuple(carried), left_out)


def _entries(source: Path) -> Iterator[Path]:
    """The entries of a source directory, with those of the folder of templates in its place."""
    for path in sorted(source.iterdir()):
        if path.name == TEMPLATES and path.is_dir():
            yield from sorted(path.iterdir())
        else:
            yield path


def _reason(path: Path, name: str) -> str | None:
    """Why an entry is left out, None if it is carried."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return "a folder"
    if not path.is_file():
        return "a link to a file that does not exist" if path.is_symlink() else "not a file"
    if name.endswith(".index.json"):
        return "an index of other weights"
    if path.suffix in _TENSORS:
        return "tensors that are not read"
    if path.stat().st_size > _LARGEST:
        return f"larger than {_LARGEST // 1_000_000} MB"
    return _REASONS.get(name)
