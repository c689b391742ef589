"""The models that speed is measured on: the artifacts themselves, twins of a few of their layers, or twins of a fixed shape.

How long a step takes depends on shapes and number formats, not on the values of the weights. So artifacts of one layout are timed
once, and random weights do where the artifact itself does not fit. All models that are timed are in memory at once, because they
take turns: the artifacts are timed whole only where all of them fit together, the one in float16 included. Otherwise every model,
FP16's too, is a twin of its own layers, so that a column holds one kind of number.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from quantlab.errors import EvaluationError, QuantlabError
from quantlab.evaluation.speed.metrics import Timed
from quantlab.evaluation.speed.own_layers import own_layers
from quantlab.evaluation.suite import SpeedSuite
from quantlab.files import read_json
from quantlab.formats.compressed_tensors import QuantizationConfig
from quantlab.formats.layouts import description_in
from quantlab.runtime.device import free_bytes
from quantlab.runtime.inventory import weight_bytes
from quantlab.runtime.load import load, needed_bytes
from quantlab.runtime.twin import random_twin

_SEED: Final = 0
_SHARE: Final = 0.8
"""Of the free memory that the weights of all models may take; caches and activations take the rest."""
_STORAGE: Final = frozenset({"quantization_config", "dtype", "torch_dtype", "transformers_version"})
"""Fields of config.json that the rest of a layout says, or that change no step."""
DTYPES: Final = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Layout:
    """What decides how fast an artifact is: artifacts with the same layout are timed once.

    Attributes:
        dtype: of activations and of weights that are not quantized.
        quantization: which linears are quantized, and how.
        config: the rest of config.json as JSON; empty where the shape is fixed by the suite.
    """

    dtype: str
    quantization: QuantizationConfig | None
    config: str = ""


@dataclass(frozen=True)
class ModelBuilder:
    """How models are made for timing.

    Attributes:
        timed: which kind they are.
        description: the same in words.
        shape: config.json of a twin of a fixed shape; empty for the other kinds.
    """

    timed: Timed
    description: str
    shape: Mapping[str, Any]

    def build(self, layout: Layout, directory: Path, *, device: str) -> PreTrainedModel:
        """The model of a layout.

        Args:
            layout: of its weights.
            directory: an artifact of that layout, or for float16 a checkpoint in floating point.
            device: where it computes.

        Raises:
            QuantlabError: it cannot be read, or does not fit into memory.
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
    """What is timed.

    Args:
        suite: may fix a shape.
        layouts: every distinct layout with a directory of it.
        device: where models compute.
        timed: what an earlier process chose; None to choose.
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
    """Whether all models fit into the free memory together; what cannot be read will say so when it is loaded."""
    needed = 0
    for layout, directory in layouts.items():
        try:
            needed += needed_bytes(directory, DTYPES[layout.dtype])
        except QuantlabError:
            continue
    free = free_bytes(device)
    return free is None or needed <= _SHARE * free


def fp16_of(layouts: Iterable[Layout], source: Path) -> Layout:
    """The layout that ratios are taken against: the source's shape in float16, or the fixed shape of the others.

    Args:
        layouts: of the artifacts.
        source: a checkpoint in floating point.
    """
    own = any(layout.config for layout in layouts)
    return Layout("float16", None, _config_of(read_json(source / "config.json")) if own else "")


def layout_of(directory: Path, *, own_shape: bool = False) -> Layout:
    """The layout of a checkpoint, from its config.json. FP8 blocks are expanded to bfloat16 when loaded.

    Args:
        directory: the checkpoint.
        own_shape: whether its own shape is part of it.

    Raises:
        EvaluationError: the checkpoint is of a layout the runtime does not compute with.
    """
    config = read_json(directory / "config.json")
    description = description_in(config, where=str(directory / "config.json"))
    expanded = description is None or not any(number.is_integer for number in description.formats)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or ("float32" if description is None else "bfloat16"))
    shape = _config_of(config) if own_shape else ""
    if dtype in DTYPES and expanded:
        return Layout(dtype, None, shape)
    if dtype in DTYPES and isinstance(description, QuantizationConfig):
        return Layout(dtype, description, shape)
    raise EvaluationError(
        "the speed of this layout cannot be measured",
        where=str(directory / "config.json"),
        found=dtype if dtype not in DTYPES else str(config["quantization_config"]["quant_method"]),
        fix=f"use one of {', '.join(DTYPES)}, fp8 or compressed-tensors",
    )


def _config_of(config: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in config.items() if key not in _STORAGE}, sort_keys=True)


def layout_name(layout: Layout, model: PreTrainedModel) -> str:
    """The layout for people: "bfloat16", "int4_g128 on 93 % of the weights, the rest float16"."""
    if layout.quantization is None:
        return layout.dtype
    counted = weight_bytes(model)
    share = 100 * counted.quantized_fp16 / counted.fp16
    schemes = " and ".join(number.name for number in layout.quantization.formats)
    return f"{schemes} on {share:.0f} % of the weights, the rest {layout.dtype}"
