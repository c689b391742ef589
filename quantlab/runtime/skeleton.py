"""The tensors that the runtime expects of a checkpoint, from a model without memory, compared with those that it has.

Takes a second for DeepSeek-V3: transformers builds the model on the meta device, where tensors have a shape only.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from quantlab.architectures.architecture import Architecture
from quantlab.architectures.detect import of_model_type
from quantlab.architectures.layer import GATED_MLP
from quantlab.errors import CheckpointError
from quantlab.runtime.modules.build import CONFIG_ERRORS, FUSED_EXPERTS, config_of, invalid_config

Shapes = Mapping[str, tuple[int, ...]]


def check_tensors(config: Mapping[str, Any], shapes: Shapes, *, where: str) -> None:
    """Compare the tensors of a checkpoint with those of the model that its config describes.

    Args:
        config: config.json.
        shapes: shapes of the checkpoint's weights by name, experts one by one.
        where: the checkpoint's directory, for errors.

    Raises:
        ArtifactError: the runtime does not know the model type, or transformers cannot build the model.
        CheckpointError: a tensor is missing, is left over, or has another shape.
    """
    model_config = config_of(config, where=f"{where}/config.json")
    architecture = of_model_type(model_config.model_type)
    assert architecture is not None, "a config of `config_of`"
    expected = expected_tensors(model_config, architecture)
    fields = model_config.to_dict()
    present = {
        name: shape
        for name, shape in shapes.items()
        if 0 not in shape
        and not name.endswith(".rotary_emb.inv_freq")
        and not architecture.outside_the_model(name, fields)
    }
    problems = {
        "tensors of the model are missing": sorted(expected.keys() - present.keys()),
        "the model has no place for tensors of the checkpoint": sorted(present.keys() - expected.keys()),
        "shapes of tensors do not match the config": [
            f"{name} {list(present[name])} for {list(shape)}"
            for name, shape in expected.items()
            if present.get(name, shape) != shape
        ],
    }
    for problem, names in problems.items():
        if names:
            raise CheckpointError(
                problem,
                where=where,
                found=", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else ""),
                fix="use the config.json the weights were released with, or remove what the model does not compute with",
            )


def expected_tensors(config: PreTrainedConfig, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a checkpoint of a model stores, with the linears of experts one by one.

    Tensors without elements are left out: some checkpoints store them, others do not.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except CONFIG_ERRORS as error:
        raise invalid_config(error, where=f"the config of a {config.model_type}") from error
    found: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(getattr(module, FUSED_EXPERTS, None), nn.Parameter):
            found |= _experts(module, prefix)
            continue
        tensors = dict(module.named_parameters(recurse=False))
        tensors |= {
            name: buffer
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }
        found |= {prefix + name: tuple(tensor.shape) for name, tensor in tensors.items()}
    fields = config.to_dict()
    return {
        name: shape
        for name, shape in found.items()
        if 0 not in shape and not architecture.outside_the_model(name, fields)
    }


def _experts(module: nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    count, hidden, width = module.get_parameter(GATED_MLP.down).shape
    shapes = {GATED_MLP.gate: (width, hidden), GATED_MLP.up: (width, hidden), GATED_MLP.down: (hidden, width)}
    return {f"{prefix}{expert}.{name}.weight": shape for expert in range(count) for name, shape in shapes.items()}
