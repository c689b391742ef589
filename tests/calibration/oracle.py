"""A slow oracle of calibration: the whole model in memory, with every input of every module recorded."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantlab.calibration.collect import Stream
from quantlab.calibration.hidden import HiddenStates, Workspace
from quantlab.calibration.layer import EMBEDDINGS, Layer, Skeleton
from tests.checkpoints import reference_dequantize

SAMPLES, LENGTH = 6, 24
CPU = torch.device("cpu")


def tokens(seed: int = 5) -> Tensor:
    return torch.randint(2, 384, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(seed))


def dense_weights(directory: Path) -> dict[str, Tensor]:
    """Every weight of a checkpoint in float32; FP8 blocks are dequantized element by element."""
    stored: dict[str, Tensor] = {}
    for path in directory.glob("*.safetensors"):
        stored.update(load_file(path))
    return {
        name: (
            reference_dequantize(tensor, stored[name + "_scale_inv"]) if tensor.dtype == torch.float8_e4m3fn else tensor
        ).float()
        for name, tensor in stored.items()
        if not name.endswith("_scale_inv")
    }


def write_dense(source: Path, target: Path, **changes: object) -> Path:
    """Write the checkpoint in float32, without quantization, with changed config fields."""
    target.mkdir(parents=True)
    config = {**json.loads((source / "config.json").read_text()), "torch_dtype": "float32", **changes}
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config))
    save_file(dense_weights(source), target / "model.safetensors", metadata={"format": "pt"})
    return target


def load_model(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


@dataclass
class Seen:
    """Record of a model's run: hidden states around every layer, inputs of every linear, calls of the experts."""

    hidden: list[Tensor] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    routed: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)


@torch.no_grad()
def watch(model: PreTrainedModel, ids: Tensor) -> Seen:
    seen, hooks = Seen(), []

    def keep(name: str):
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if isinstance(module, nn.Linear):
                seen.inputs[name + ".weight"] = arguments[0].reshape(-1, module.in_features).clone()
            else:
                seen.routed[name] = tuple(argument.clone() for argument in arguments)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or name.endswith("mlp.experts"):
            hooks.append(module.register_forward_pre_hook(keep(name)))
    seen.hidden = list(model(ids, output_hidden_states=True, use_cache=False).hidden_states)
    for hook in hooks:
        hook.remove()
    return seen


def hessian(x: Tensor) -> Tensor:
    return x.double().T @ x.double() / len(x)


def cross(original: Tensor, x: Tensor) -> Tensor:
    return (original.double() - x.double()).T @ x.double() / len(x)


def close(found: Tensor | None, expected: Tensor, *, tolerance: float = 2e-5) -> bool:
    """Whether the largest difference is small relative to the largest value."""
    assert found is not None
    assert found.shape == expected.shape
    return bool((found.double() - expected.double()).abs().max() <= tolerance * expected.double().abs().max())


def skeleton_of(directory: Path, dtype: torch.dtype = torch.float32) -> Skeleton:
    return Skeleton(json.loads((directory / "config.json").read_text()), dtype=dtype, device=CPU)


def filled(skeleton: Skeleton, index: int, weights: dict[str, Tensor]) -> Layer:
    layer = skeleton.layer(index)
    layer.fill(weights.__getitem__)
    return layer


def embedded(
    skeleton: Skeleton, weights: dict[str, Tensor], directory: Path, *, memory: int = 1 << 30, tokens_at_once: int = 60
) -> HiddenStates:
    workspace = Workspace(directory, memory_bytes=memory, device=CPU, tokens_at_once=tokens_at_once)
    stream = workspace.stream(SAMPLES, LENGTH, skeleton.width, dtype=skeleton.dtype)
    stream.write(slice(0, SAMPLES), skeleton.embed(tokens(), weights[EMBEDDINGS]))
    return stream


def through(layer: Layer, stream: HiddenStates) -> None:
    from quantlab.calibration.collect import advance

    for half in layer.halves:
        advance(Stream(half, stream))
