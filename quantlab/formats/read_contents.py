"""The contents of a checkpoint, from its headers."""

from quantlab.architectures.config import size_of
from quantlab.architectures.detect import detect
from quantlab.formats.contents import Contents, Weight, method_of
from quantlab.formats.stored import StoredWeights


def contents_of(stored: StoredWeights) -> Contents:
    """The contents of a checkpoint; reads no weights.

    Raises:
        ArtifactError, CheckpointError: its family is unknown, or its tensors contradict its config.json.
    """
    checkpoint = stored.reader.checkpoint
    architecture, layers = detect(checkpoint.config), size_of(checkpoint.config, "num_hidden_layers")
    weights = []
    for name in stored.names():
        tensor = architecture.classify(name, hidden_layers=layers)
        one = stored.stored(name)
        if one is None:
            entry = checkpoint.tensors[name]
            weights.append(Weight(tensor, entry.shape, None, "dense", entry.dtype))
        else:
            weights.append(Weight(tensor, one.shape, one.number, one.layout, one.scale.dtype))
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return Contents(architecture, config, tuple(weights), checkpoint.directory, method_of(weights))
