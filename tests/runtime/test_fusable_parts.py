"""Fused steps run only for models whose every part is recognized; transformers' forward methods decode all others."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantlab.runtime.decode import Decoder
from quantlab.runtime.decoding.fusable_parts import ModelParts, NotFused, parts_of
from quantlab.runtime.load import load
from quantlab.runtime.modules.linear import Norm
from quantlab.runtime.native.library import library, status
from tests.runtime.tiny import FAMILIES, relative_error, tokens

pytestmark = pytest.mark.skipif(library() is None, reason=status())


def with_forward(module: nn.Module, forward: Callable[[nn.Module, Callable[..., object], tuple, dict], object]) -> None:
    """Change the class of a module to a subclass whose forward method wraps the old one."""
    old = type(module)

    class Changed(old):  # type: ignore[misc, valid-type]
        def forward(self, *args: object, **kwargs: object) -> object:
            return forward(self, super().forward, args, kwargs)

    Changed.__name__ = old.__name__
    module.__class__ = Changed


def scale_of_a_layer(model: PreTrainedModel) -> str:
    layer = model.model.layers[0]
    layer.gain = nn.Parameter(torch.tensor(0.5, dtype=model.dtype))
    with_forward(layer, lambda self, old, args, kwargs: old(*args, **kwargs) * self.gain)
    return "model.layers.0.gain"


def norm_after_attention(model: PreTrainedModel) -> str:
    attention = model.model.layers[0].self_attn
    attention.after = Norm(model.model.norm)
    with_forward(attention, lambda self, old, args, kwargs: (self.after(old(*args, **kwargs)[0]), None))
    return "model.layers.0.self_attn.after"


def buffer_of_a_layer(model: PreTrainedModel) -> str:
    layer = model.model.layers[0]
    layer.register_buffer("offset", torch.full((), 0.25, dtype=model.dtype))
    with_forward(layer, lambda self, old, args, kwargs: old(*args, **kwargs) + self.offset)
    return "model.layers.0.offset"


def wrapped_mlp(model: PreTrainedModel) -> str:
    class Twice(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.inner(x)

    layer = model.model.layers[0]
    layer.mlp = Twice(layer.mlp)
    return "model.layers.0.mlp"


def another_norm(model: PreTrainedModel) -> str:
    width = model.config.hidden_size
    model.model.layers[1].input_layernorm = nn.LayerNorm(width, dtype=model.dtype)
    return "model.layers.1.input_layernorm (LayerNorm)"


def norm_before_the_layers(model: PreTrainedModel) -> str:
    model.model.first = Norm(model.model.norm)
    first = model.model.first
    model.model.embed_tokens.register_forward_hook(lambda _, __, output: first(output))
    return "model.first"


CHANGES = (
    scale_of_a_layer,
    norm_after_attention,
    buffer_of_a_layer,
    wrapped_mlp,
    another_norm,
    norm_before_the_layers,
)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_decodes_a_model_with_an_unknown_part(
    family: str, change: Callable[[PreTrainedModel], str], checkpoints: dict[str, Path]
) -> None:
    model = load(checkpoints[family], dtype=torch.bfloat16)
    assert isinstance(parts_of(model), ModelParts)
    ids = tokens(2, 9)
    with torch.inference_mode():
        unchanged = model(input_ids=ids).logits[:, -1].float()
        named = change(model)
        expected = model(input_ids=ids).logits[:, -1].float()
    assert relative_error(expected, unchanged) > 0.05, "the change has an effect"
    decoder = Decoder(model, batch=2, length=16)
    assert decoder.not_fused is not None
    assert named in decoder.not_fused
    decoder.prefill(ids[:, :5])
    for position in range(5, 9):
        found = decoder.step(ids[:, position])
    # different rounding may route a token to other experts
    assert ((found.float() - expected).norm(dim=1) / expected.norm(dim=1)).max() < 0.1


def test_a_missing_part_prevents_fusion(checkpoints: dict[str, Path]) -> None:
    model = load(checkpoints["llama"], dtype=torch.bfloat16)
    del model.model.layers[1].self_attn.o_proj
    assert parts_of(model) == NotFused("fused steps require model.layers.1.self_attn.o_proj, which does not exist")


def test_not_fused_gives_the_reason(checkpoints: dict[str, Path]) -> None:
    wide = load(checkpoints["llama"], dtype=torch.float32)
    assert Decoder(wide, batch=1, length=8).not_fused == "fused steps compute in 16 bits, the model computes in float32"
    model = load(checkpoints["llama"], dtype=torch.bfloat16)
    assert Decoder(model, batch=1, length=8).not_fused is None
    assert Decoder(model, batch=1, length=8, fuse=False).not_fused == "fused steps are turned off"
    eager = load(checkpoints["deepseek_v2"], dtype=torch.bfloat16, attention="eager")
    assert (
        Decoder(eager, batch=1, length=8).not_fused == "fused steps do not support the attention implementation eager"
    )
    model.model.layers[0].input_layernorm.weight.data = model.model.layers[0].input_layernorm.weight.data.float()
    assert parts_of(model) == NotFused("model.layers.0.input_layernorm is float32, the model bfloat16")


def test_an_undeclared_family_prevents_fusion(checkpoints: dict[str, Path]) -> None:
    model = load(checkpoints["llama"], dtype=torch.bfloat16)
    with_forward(model, lambda _, old, args, kwargs: old(*args, **kwargs))
    type(model).__name__ = "OtherForCausalLM"
    assert parts_of(model) == NotFused("fused steps do not support OtherForCausalLM")
