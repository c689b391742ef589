"""A checkpoint as the rules of engines know it."""

from quantlab.architectures.config import size_of
from quantlab.architectures.detect import detect
from quantlab.formats.engine_rules.rule import HeldModel, HeldWeight, method_of
from quantlab.formats.stored import StoredWeights


def held_model(stored: StoredWeights) -> HeldModel:
    """The weights of a checkpoint with their roles, shapes, number formats and layouts, from headers.

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
            weights.append(HeldWeight(tensor, checkpoint.tensors[name].shape, None, "dense"))
        else:
            weights.append(HeldWeight(tensor, one.shape, one.number, one.layout))
    return HeldModel(architecture.class_name, method_of(weights), tuple(weights))
