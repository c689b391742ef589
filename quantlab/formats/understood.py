"""A checkpoint as the rest of quantlab reads it: one name per expert, and every part of the model in config.json."""

import dataclasses
from typing import Final

from quantlab.architectures.config import size_of
from quantlab.architectures.detect import of_model_type
from quantlab.checkpoint.index import Checkpoint
from quantlab.formats.fused import unfused

_MTP_LAYERS: Final = "num_nextn_predict_layers"
_OF_MTP_LAYERS: Final = "model.layers.{layer}.eh_proj.weight"
"""A tensor that every multi-token-prediction layer has, and no other layer."""


def understood(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with fused experts divided, and with the number of its multi-token-prediction layers.

    Some releases leave that number out of config.json; the tensors after the last hidden layer give it.

    Raises:
        CheckpointError: fused experts cannot be divided, or config.json has no number of layers.
    """
    checkpoint = unfused(checkpoint)
    architecture = of_model_type(checkpoint.config.get("model_type"))
    if architecture is None or not architecture.mtp or checkpoint.config.get(_MTP_LAYERS) is not None:
        return checkpoint
    layers = size_of(checkpoint.config, "num_hidden_layers")
    found = 0
    while _OF_MTP_LAYERS.format(layer=layers + found) in checkpoint.tensors:
        found += 1
    if not found:
        return checkpoint
    return dataclasses.replace(checkpoint, config={**checkpoint.config, _MTP_LAYERS: found})
