"""A model's own layers, one of each kind, as the config.json of a small model: for models that are too large to be timed whole.

All layers of a kind take the same time, so one of each kind is enough. The embedding and the head are not repeated per layer:
behind few layers the head would take a far larger share of a step than behind all. Its vocabulary is therefore cut by the same
factor as the number of layers, so the head keeps its share of the time. Needs no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from quantlab.architectures.config import Config
from quantlab.architectures.detect import detect

_VOCABULARY_STEP: Final = 64
"""Rows that the kernels take at once."""


@dataclass(frozen=True)
class OwnLayers:
    """A small model of a large one's layers.

    Attributes:
        config: its config.json.
        layers: for each of its layers the number of the layer in the whole model.
        description: for the heads of tables.
    """

    config: Mapping[str, Any]
    layers: tuple[int, ...]
    description: str


def own_layers(config: Config) -> OwnLayers:
    """One layer of each kind (dense, MoE) of a model, its head cut so that it keeps its share of a step's time.

    Args:
        config: config.json of the whole model.

    Raises:
        CheckpointError: the architecture is none of those quantlab knows, or a size is missing.
    """
    sizes = detect(config).dimensions(config)
    count, vocabulary = sizes["layers"], sizes["vocabulary"]
    moe = [layer for layer in range(sizes["first_moe"], count) if layer % sizes["moe_every"] == 0]
    dense = sorted(set(range(count)) - set(moe))
    kinds = {name: layers for name, layers in (("dense", dense), ("MoE", moe)) if layers}
    kept = sorted(layers[0] for layers in kinds.values())
    # `first_k_dense_replace` can only put dense layers first; time does not depend on the order
    kept.sort(key=lambda layer: layer in moe)
    rows = max(vocabulary * len(kept) // (count * _VOCABULARY_STEP), 1) * _VOCABULARY_STEP
    fields = {key: value for key, value in config.items() if key != "quantization_config"}
    fields |= {"num_hidden_layers": len(kept), "vocab_size": min(rows, vocabulary), "num_nextn_predict_layers": 0}
    if sizes["experts"]:
        fields |= {"first_k_dense_replace": len(kept) - bool(moe), "moe_layer_freq": 1}
    if isinstance(config.get("layer_types"), list):
        fields["layer_types"] = [config["layer_types"][layer] for layer in kept]
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):  # may lie outside the smaller vocabulary
        fields.pop(token, None)
    named = " + ".join(f"1 of {len(layers)} {name}" for name, layers in kinds.items())
    description = f"own layers ({named}), vocabulary cut from {vocabulary:,} to {fields['vocab_size']:,} so that the head keeps its share"
    return OwnLayers(fields, tuple(kept), description)
