"""The contents of a checkpoint, from its headers. Does not import torch."""

from quantlab.architectures.config import size_of
from quantlab.architectures.detect import detect
from quantlab.checkpoint.index import Checkpoint
from quantlab.formats.contents import Contents, Weight, method_of
from quantlab.formats.layouts import description_of, logical_names


def contents_of(checkpoint: Checkpoint) -> Contents:
    """The contents of a checkpoint; reads no weights.

    Raises:
        ArtifactError, CheckpointError: its family is unknown, or its tensors contradict its config.json.
    """
    description, tensors = description_of(checkpoint), checkpoint.tensors
    architecture, layers = detect(checkpoint.config), size_of(checkpoint.config, "num_hidden_layers")
    weights = []
    for name in logical_names(tensors):
        tensor = architecture.classify(name, hidden_layers=layers)
        one = description.stored(name, tensors) if description and name.endswith(".weight") else None
        if one is None:
            entry = tensors[name]
            weights.append(Weight(tensor, entry.shape, None, "dense", entry.dtype))
        else:
            weights.append(Weight(tensor, one.shape, one.number, one.layout, one.scale.dtype))
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return Contents(architecture, config, tuple(weights), checkpoint.directory, method_of(weights))
