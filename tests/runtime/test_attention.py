"""Latent attention, compared with transformers' attention, which expands the cache."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from quantlab.errors import DeviceError
from quantlab.recipe.schemes import SCHEMES
from quantlab.runtime.load import load
from quantlab.runtime.modules import attention
from quantlab.runtime.modules.linear import PackedLinear
from quantlab.runtime.twin import random_twin
from tests.checkpoints import all_linears
from tests.runtime.tiny import FAMILIES, dense_reference, relative_error, tokens

LATENT = ("deepseek_v2", "deepseek_v3")


def steps(model: PreTrainedModel, lengths: tuple[int, ...], *, batch: int, padding: int) -> list[Tensor]:
    """Logits of each step of a cached run that reads `lengths` tokens at a time; the first sequence has padding."""
    whole = tokens(batch, sum(lengths))
    mask = torch.ones_like(whole)
    mask[0, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, start, found = DynamicCache(config=model.config), 0, []
    for length in lengths:
        stop = start + length
        with torch.no_grad():
            step = model(
                input_ids=whole[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
        found.append(step.logits[:, max(padding - start, 0) :])
        start = stop
    return found


@pytest.fixture
def expansions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of new tokens of every call of `absorbed`."""
    seen: list[int] = []
    whole = attention.absorbed

    def counted(query: Tensor, *arguments: Tensor, **options: object) -> Tensor:
        seen.append(query.shape[2])
        return whole(query, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "absorbed", counted)
    return seen


@pytest.mark.parametrize(("batch", "padding"), [(1, 0), (3, 0), (3, 4)])
@pytest.mark.parametrize("lengths", [(7, 1, 1, 1, 1), (20, 2, 1, 3, 1)])
@pytest.mark.parametrize("family", LATENT)
def test_decoding_equals_transformers(
    family: str, lengths: tuple[int, ...], batch: int, padding: int, checkpoints: dict[str, Path], expansions: list[int]
) -> None:
    model, reference = load(checkpoints[family], dtype=torch.float32), dense_reference(checkpoints[family])
    expected = steps(reference, lengths, batch=batch, padding=padding)
    assert not expansions
    for found, truth in zip(steps(model, lengths, batch=batch, padding=padding), expected, strict=True):
        assert relative_error(found, truth) <= 1e-5
    assert [length for length in lengths[1:] for _ in model.model.layers] == expansions, "the prefill alone expands"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", LATENT)
def test_sixteen_bit_attention_stays_close(family: str, dtype: torch.dtype, checkpoints: dict[str, Path]) -> None:
    exact, fast = (load(checkpoints[family], dtype=chosen) for chosen in (torch.float32, dtype))
    for model in (exact, fast):
        assert model.model.layers[0].self_attn.expand_kv is attention._latents_unchanged
    expected = steps(exact, (7, 1, 1), batch=2, padding=3)
    for found, truth in zip(steps(fast, (7, 1, 1), batch=2, padding=3), expected, strict=True):
        assert (found.float() - truth).norm() / truth.norm() <= 0.25  # a token's expert can flip on a rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 4, 1, 9), (3, 16, 1, 40), (2, 5, 3, 21)])
@pytest.mark.parametrize("kind", ["none", "boolean", "added"])
def test_absorbed_attention_equals_its_formula(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    batch, heads, new, cached = shape
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).mul(0.5).to(dtype)

    query, latents, rotary = random(batch, heads, new, 48), random(batch, 1, cached, 72), random(batch, 1, cached, 16)
    weight = random(heads, 32 + 24, 72)
    mask = torch.rand(batch, 1, new, cached, generator=generator) < 0.7
    mask[..., 0] = True
    added = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    chosen = {"none": None, "boolean": mask, "added": added}[kind]
    found = attention.absorbed(query, latents, rotary, weight, mask=chosen, scaling=0.2)
    assert found.shape == (batch, new, heads, 24)
    assert found.dtype == dtype
    expanded = torch.einsum("bsl,hrl->bhsr", latents.double().squeeze(1), weight.double())
    keys = torch.cat((expanded[..., :32], rotary.double().expand(-1, heads, -1, -1)), dim=-1)
    scores = query.double() @ keys.mT * 0.2
    if kind != "none":
        scores = scores.masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ expanded[..., 32:]).transpose(1, 2)
    assert relative_error(found, expected) <= {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]


def test_a_quantized_kv_b_expands_as_in_transformers(expansions: list[int]) -> None:
    config = {"model_type": "deepseek_v3", **FAMILIES["deepseek_v3"]}
    everything = all_linears(SCHEMES["int8"], ("lm_head", r"re:.*mlp\.gate$"))
    model = random_twin(config, everything, dtype=torch.bfloat16, seed=0)
    assert isinstance(model.model.layers[0].self_attn.kv_b_proj, PackedLinear)
    assert all(torch.isfinite(found).all() for found in steps(model, (7, 1, 1), batch=2, padding=0))
    assert not expansions


def test_a_copy_of_a_model_attends_with_its_own_weights(checkpoints: dict[str, Path]) -> None:
    model = load(checkpoints["deepseek_v2"], dtype=torch.float32)
    copied = copy.deepcopy(model)
    before = steps(copied, (7, 1), batch=1, padding=0)
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.weight.zero_()
    assert torch.equal(steps(copied, (7, 1), batch=1, padding=0)[1], before[1])


def test_one_new_token_expands_nothing(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(checkpoints["deepseek_v3"], dtype=torch.bfloat16)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=tokens(), past_key_values=cache, use_cache=True)
        for layer in model.model.layers:
            monkeypatch.setattr(layer.self_attn.kv_b_proj, "forward", None)
        model(input_ids=tokens()[:, :1], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["deepseek_v3", "llama"])
def test_other_implementations_give_the_same_result(
    implementation: str, family: str, checkpoints: dict[str, Path], expansions: list[int]
) -> None:
    expected = steps(dense_reference(checkpoints[family]), (7, 1, 1), batch=2, padding=3)
    model = load(checkpoints[family], dtype=torch.float32, attention=implementation)
    assert model.config._attn_implementation == implementation
    for found, truth in zip(steps(model, (7, 1, 1), batch=2, padding=3), expected, strict=True):
        assert relative_error(found, truth) <= 1e-5
    assert not expansions, "latents are expanded before they come to these"


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash attention may be installed")
def test_an_unknown_implementation_is_an_error(checkpoints: dict[str, Path]) -> None:
    for name, found in (("flash_attention_2", "not installed"), ("fast", "an unknown name")):
        with pytest.raises(DeviceError, match=rf"implementation is not available[^$]*{name}[^$]*{found}[^$]*eager"):
            load(checkpoints["llama"], attention=name)
