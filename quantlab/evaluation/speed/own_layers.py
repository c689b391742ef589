"""The config.json of a small model with one layer of each kind of a large model that cannot be timed whole.

All layers of a kind take the same time, so one of each kind is enough. With fewer layers the head would take a larger share of a
step, so the vocabulary is reduced by the same factor as the number of layers: the head keeps its share of the time. Needs no
torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from quantlab.architectures.config import Config
from quantlab.architectures.detect import detect

_VOCABULARY_STEP: Final = 64
"""The reduced vocabulary is a multiple of this number of rows, which the kernels process together."""


@dataclass(frozen=True)
class OwnLayers:
    """A small model with layers of a large one.

    Attributes:
        config: its config.json.
        layers: for each of its layers, the layer's index in the whole model.
        description: its description for table headings.
    """

    config: Mapping[str, Any]
    layers: tuple[int, ...]
    description: str


def own_layers(config: Config) -> OwnLayers:
    """One layer of each kind (dense, MoE) of a model, with the vocabulary reduced so that the head keeps its share of a step's time.

    Args:
        config: config.json of the whole model.

    Raises:
        CheckpointError: quantlab does not support the architecture, or a size is missing.
    """
    architecture = detect(config)
    vocabulary = architecture.dimensions(config)["vocabulary"]
    dense, moe = architecture.dense_and_moe(config)
    kept = (*dense[:1], *moe[:1])
    rows = max(vocabulary * len(kept) // ((len(dense) + len(moe)) * _VOCABULARY_STEP), 1) * _VOCABULARY_STEP
    rows = min(rows, vocabulary)
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    fields = architecture.with_layers(plain, dense=len(dense[:1]), moe=len(moe[:1]), vocabulary=rows)
    if isinstance(config.get("layer_types"), list):
        fields["layer_types"] = [config["layer_types"][layer] for layer in kept]
    named = " + ".join(f"1 of {len(layers)} {name}" for name, layers in (("dense", dense), ("MoE", moe)) if layers)
    cut = f"vocabulary cut from {vocabulary:,} to {rows:,} so that the head keeps its share"
    return OwnLayers(fields, kept, f"own layers ({named}), {cut}")
