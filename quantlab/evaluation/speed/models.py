"""The models that speed is measured on: the artifacts themselves, twins of a few of their layers, or twins of a fixed shape.

The time of a step depends on shapes and number formats, not on the values of the weights. So artifacts with the same layout are
timed once, and random weights replace an artifact that does not fit into memory. All timed models are in memory together because
they alternate. The artifacts are timed whole only if all of them fit together with the FP16 model. Otherwise every model,
including FP16, is a twin of its own layers, so that a column holds one kind of number.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from quantlab.checkpoint.index import open_checkpoint
from quantlab.errors import EvaluationError, QuantlabError
from quantlab.evaluation.speed.metrics import Timed
from quantlab.evaluation.speed.own_layers import own_layers
from quantlab.evaluation.suite import SpeedSuite
from quantlab.files import read_json
from quantlab.formats.compressed_layouts import PACKED, PLAIN
from quantlab.formats.compressed_tensors import QuantizationConfig, describe
from quantlab.formats.contents import described_linears
from quantlab.formats.dtype import dtype_of, stated_dtype
from quantlab.formats.layouts import description_in
from quantlab.formats.read_contents import contents_of
from quantlab.formats.understood import understood
from quantlab.numerics.number_format import NF4
from quantlab.runtime.device import free_bytes
from quantlab.runtime.inventory import weight_bytes
from quantlab.runtime.load import load, needed_bytes
from quantlab.runtime.twin import random_twin

_SEED: Final = 0
_SHARE: Final = 0.8
"""Share of the free memory that the weights of all models may use; the rest is for caches and activations."""
_STORAGE: Final = frozenset({"quantization_config", "dtype", "torch_dtype", "transformers_version"})
"""Fields of config.json that other fields of `Layout` hold, or that do not affect speed."""
DTYPES: Final = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Layout:
    """Everything that determines an artifact's speed. Artifacts with the same layout are timed once.

    Attributes:
        dtype: dtype of activations and of weights that are not quantized.
        quantization: the quantized linears and their number formats.
        config: the rest of config.json as JSON; empty if the suite fixes the shape.
    """

    dtype: str
    quantization: QuantizationConfig | None
    config: str = ""


@dataclass(frozen=True)
class ModelBuilder:
    """Builds the models that are timed.

    Attributes:
        timed: kind of the models.
        description: the models in words.
        shape: config.json of a twin of a fixed shape; empty for the other kinds.
    """

    timed: Timed
    description: str
    shape: Mapping[str, Any]

    def build(self, layout: Layout, directory: Path, *, device: str) -> PreTrainedModel:
        """Build the model of a layout.

        Args:
            layout: layout of its weights.
            directory: an artifact with that layout, or for float16 a floating-point checkpoint.
            device: device of the model.

        Raises:
            QuantlabError: the directory cannot be read, or the model does not fit into memory.
        """
        dtype = DTYPES[layout.dtype]
        match self.timed:
            case "artifact":
                return load(directory, dtype=dtype, device=device)
            case "own layers":
                own = own_layers(json.loads(layout.config))
                return random_twin(
                    own.config, layout.quantization, dtype=dtype, seed=_SEED, device=device, layers=own.layers
                )
            case "twin":
                return random_twin(self.shape, layout.quantization, dtype=dtype, seed=_SEED, device=device)


def choose_builder(
    suite: SpeedSuite, layouts: Mapping[Layout, Path], device: torch.device, timed: Timed | None
) -> ModelBuilder:
    """Choose the kind of the timed models.

    Args:
        suite: suite, which may fix a shape.
        layouts: every distinct layout with a directory that has it.
        device: device of the models.
        timed: the choice of an earlier process; None to choose.
    """
    if suite.shape:
        return ModelBuilder("twin", suite.description, suite.shape)
    if timed is None:
        timed = "artifact" if _fit(layouts, device) else "own layers"
    if timed == "artifact":
        return ModelBuilder(timed, "the whole artifacts", {})
    described = dict.fromkeys(own_layers(json.loads(layout.config)).description for layout in layouts)
    return ModelBuilder("own layers", "; ".join(described), {})


def _fit(layouts: Mapping[Layout, Path], device: torch.device) -> bool:
    """Whether all models fit into the free memory together; unreadable ones are ignored, loading them raises the error."""
    needed = 0
    for layout, directory in layouts.items():
        try:
            needed += needed_bytes(directory, DTYPES[layout.dtype])
        except QuantlabError:
            continue
    free = free_bytes(device)
    return free is None or needed <= _SHARE * free


def fp16_of(layouts: Iterable[Layout], source: Path) -> Layout:
    """The layout of the FP16 reference: float16 in the source's shape, or in the shape that the suite fixes.

    Args:
        layouts: layouts of the artifacts.
        source: the floating-point source checkpoint.
    """
    own = any(layout.config for layout in layouts)
    return Layout("float16", None, _config_of(read_json(source / "config.json")) if own else "")


def layout_of(directory: Path, *, own_shape: bool = False) -> Layout:
    """The layout of a checkpoint, from its config.json and, if that names no dtype, from its headers.

    FP8 blocks count as bfloat16, to which loading expands them.

    Args:
        directory: the checkpoint.
        own_shape: whether the layout includes the checkpoint's shape.

    Raises:
        EvaluationError: the runtime holds the layout only expanded, and its own programs do not.
        ArtifactError: config.json names an unknown dtype.
        CheckpointError: it names none, and the weights cannot be read.
    """
    where = str(directory / "config.json")
    config = read_json(directory / "config.json")
    description = description_in(config, where=where)
    levels = next((one for one in description.formats if one.element == NF4), None) if description else None
    if levels is not None:
        raise EvaluationError(
            "the speed of this layout cannot be measured",
            where=where,
            found=f"{levels.name}, which the runtime expands to 16 bits when it loads it",
            fix="time it in the program that it was written for",
        )
    if description is not None and not any(number.is_integer for number in description.formats):
        description = None
    if description is not None and not isinstance(description, QuantizationConfig):
        # its tensors state the formats; the runtime holds them as it holds those of compressed-tensors
        weights = contents_of(understood(open_checkpoint(directory))).weights
        description = describe(
            described_linears(weights, lambda one: PLAIN.name if one.number and one.number.activations else PACKED.name)
        )
    dtype = stated_dtype(config, where=where) or dtype_of(open_checkpoint(directory))
    return Layout(dtype, description, _config_of(config) if own_shape else "")


def _config_of(config: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in config.items() if key not in _STORAGE}, sort_keys=True)


def layout_name(layout: Layout, model: PreTrainedModel) -> str:
    """Name of the layout in tables: "bfloat16", "int4_g128 on 93 % of the weights, the rest float16"."""
    if layout.quantization is None:
        return layout.dtype
    counted = weight_bytes(model)
    share = 100 * counted.quantized_fp16 / counted.fp16
    schemes = " and ".join(number.name for number in layout.quantization.formats)
    return f"{schemes} on {share:.0f} % of the weights, the rest {layout.dtype}"
