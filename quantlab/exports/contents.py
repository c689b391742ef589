"""The contents of a finished artifact, from its headers."""

from quantlab.architectures.config import size_of
from quantlab.architectures.detect import detect
from quantlab.exports.target import Contents, Weight
from quantlab.formats.stored import StoredWeights


def contents_of(artifact: StoredWeights) -> Contents:
    """The contents of an artifact; reads no weights.

    Raises:
        ArtifactError, CheckpointError: its family is unknown, or its tensors contradict its config.json.
    """
    checkpoint = artifact.reader.checkpoint
    architecture = detect(checkpoint.config)
    layers = size_of(checkpoint.config, "num_hidden_layers")
    weights = []
    for name in artifact.names():
        role = architecture.classify(name, hidden_layers=layers).role
        stored = artifact.stored(name)
        if stored is None:
            entry = checkpoint.tensors[name]
            weights.append(Weight(name, role, None, entry.dtype, entry.shape))
        else:
            weights.append(Weight(name, role, stored.number, stored.scale.dtype, stored.shape))
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return Contents(architecture, config, tuple(weights), checkpoint.directory)
