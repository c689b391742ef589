"""Decoding with a fixed cache, compared with transformers' growing cache, and errors for prompts that do not fit."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

from quantlab.errors import CacheError, DeviceError
from quantlab.recipe.schemes import SCHEMES
from quantlab.runtime import device
from quantlab.runtime.banks.expanded import ExpandedMatrices
from quantlab.runtime.cache_arguments import cache_arguments
from quantlab.runtime.cuda.banks import CudaMatrices
from quantlab.runtime.decode import Decoder, _not_capturable, capturable
from quantlab.runtime.load import load
from quantlab.runtime.modules import attention
from quantlab.runtime.modules.experts import Experts
from quantlab.runtime.twin import random_twin
from tests.runtime.tiny import FAMILIES, relative_error, tokens

LENGTHS = (7, 11)


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, Path]) -> dict[str, PreTrainedModel]:
    return {family: load(checkpoints[family], dtype=torch.float32) for family in FAMILIES}


def growing(model: PreTrainedModel, ids: Tensor, mask: Tensor, prompt: int) -> list[Tensor]:
    """Logits after the prompt and after each further token, one at a time."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, found = DynamicCache(config=model.config), []
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
        with torch.no_grad():
            output = model(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
        found.append(output.logits[:, -1])
    return found


@pytest.mark.parametrize(("batch", "padding"), [(1, 0), (3, 0), (3, 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_equal_those_with_a_growing_cache(
    family: str, batch: int, padding: int, models: dict[str, PreTrainedModel]
) -> None:
    model, ids = models[family], tokens(batch, LENGTHS[1])
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    expected = growing(model, ids, mask, LENGTHS[0])
    decoder = Decoder(model, batch=batch, length=16)
    for _ in range(2):  # the second time over what the first left behind
        found = [decoder.prefill(ids[:, : LENGTHS[0]], mask[:, : LENGTHS[0]] if padding else None)]
        found += [decoder.step(ids[:, i]) for i in range(*LENGTHS)]
        assert decoder.used == LENGTHS[1]
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) <= 1e-5


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_steps_under_other_implementations_of_attention(
    implementation: str, models: dict[str, PreTrainedModel], checkpoints: dict[str, Path]
) -> None:
    for family in ("deepseek_v3", "llama"):
        ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
        mask[0, :3] = 0
        expected = growing(models[family], ids, mask, 7)
        decoder = Decoder(load(checkpoints[family], dtype=torch.float32, attention=implementation), batch=2, length=12)
        found = [decoder.prefill(ids[:, :7], mask[:, :7]), *(decoder.step(ids[:, i]) for i in (7, 8))]
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_after_rewinding_a_step_is_the_same_again(family: str, models: dict[str, PreTrainedModel]) -> None:
    decoder = Decoder(models[family], batch=2, length=12)
    decoder.prefill(tokens(2, 7))
    first = [decoder.step(tokens(2, 11)[:, i]).clone() for i in range(7, 11)]
    decoder.rewind(7)
    assert decoder.used == 7
    again = [decoder.step(tokens(2, 11)[:, i]) for i in range(7, 11)]
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["deepseek_v3", "llama"])
def test_a_fixed_cache_is_filled_from_a_growing_cache(
    family: str, dtype: torch.dtype, checkpoints: dict[str, Path]
) -> None:
    model, ids = load(checkpoints[family], dtype=dtype), tokens(1, 5)
    one, others = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=ids, **cache_arguments(one))
        model(input_ids=tokens(3, 7), **cache_arguments(others))
    shared, each = (Decoder(model, batch=3, length=12) for _ in range(2))
    for prompts, held in ((ids.expand(3, -1), one), (tokens(3, 7), others), (ids.expand(3, -1), one)):
        shared.fill(held)
        each.prefill(prompts)
        assert shared.used == each.used == held.get_seq_length()
        for following in tokens(2, 3):
            assert relative_error(shared.step(following), each.step(following)) <= (
                1e-5 if dtype == torch.float32 else 0.02
            )
    with pytest.raises(CacheError, match="3 sequences of 7 tokens, the cache has room for 2"):
        Decoder(model, batch=2, length=12).fill(others)
    with pytest.raises(CacheError, match="0 sequences of 0 tokens"):
        shared.fill(DynamicCache(config=model.config))


def test_a_whole_cache_can_be_used(models: dict[str, PreTrainedModel]) -> None:
    model = models["deepseek_v3"]
    found = Decoder(model, batch=1, length=12).generate(tokens(1, 5), 8)
    assert found.shape == (1, 13), "the last token is not read, so it needs no room"
    assert torch.equal(
        found, model.generate(tokens(1, 5), max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None)
    )


def test_a_fixed_cache_of_mla_holds_latents(
    models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["deepseek_v3"]
    decoder = Decoder(model, batch=2, length=9)
    decoder.prefill(tokens(2, 5))
    layer = decoder._cache.layers[0]
    assert layer.keys.shape == (2, 1, 9, 128), "the latents"
    assert layer.values.shape == (2, 1, 9, 16), "the rotary keys"
    calls = []
    whole = attention.absorbed
    monkeypatch.setattr(attention, "absorbed", lambda *a, **k: (calls.append(1), whole(*a, **k))[1])
    for each in model.model.layers:
        monkeypatch.setattr(each.self_attn.kv_b_proj, "forward", None)
    decoder.step(tokens(2, 6)[:, 5])
    assert len(calls) == len(model.model.layers), "nothing is expanded"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_steps(dtype: torch.dtype, checkpoints: dict[str, Path]) -> None:
    for family in ("deepseek_v2", "llama"):
        model = load(checkpoints[family], dtype=dtype)
        expected = growing(model, tokens(1, 9), torch.ones(1, 9, dtype=torch.int64), 7)
        decoder = Decoder(model, batch=1, length=16)
        found = [decoder.prefill(tokens(1, 7)), *(decoder.step(tokens(1, 9)[:, i]) for i in (7, 8))]
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() / other.norm() <= 0.02


def test_prompts_that_do_not_fit_are_refused_before_anything_is_computed(models: dict[str, PreTrainedModel]) -> None:
    decoder = Decoder(models["llama"], batch=2, length=8)
    with pytest.raises(CacheError, match="the cache is empty"):
        decoder.step(torch.zeros(2, dtype=torch.int64))
    for shape in ((3, 4), (1, 4), (2, 9), (2, 0)):
        with pytest.raises(
            CacheError, match=rf"{shape[0]} sequences of {shape[1]} tokens, the cache has room for 2 of 1 … 8"
        ):
            decoder.prefill(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(CacheError, match=r"does not fit[^$]*6 prompt tokens and 4 new ones[^$]*room for 8"):
        decoder.generate(tokens(2, 6), 4)
    with pytest.raises(CacheError, match="3 sequences of 4 tokens, the cache has room for 2"):
        decoder.generate(tokens(3, 4), 3)
    assert decoder.used == 0
    decoder.prefill(tokens(2, 8))
    with pytest.raises(CacheError, match=r"the cache is full[^$]*8 of 8 tokens"):
        decoder.step(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(CacheError, match="supports 1 … 128"):
        Decoder(models["llama"], batch=1, length=129)


def test_a_cache_that_does_not_fit_into_memory(
    models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "free_bytes", lambda _: 4096)
    decoder = Decoder(models["llama"], batch=1, length=100)
    needed = 2 * 2 * 100 * 2 * 32 * 4  # keys and values, layers, tokens, heads, width, float32
    with pytest.raises(DeviceError, match=rf"{needed:,} bytes needed, 4,096 bytes free"):
        decoder.prefill(tokens(1, 7))


def test_free_memory_is_checked_before_the_prompt_is_read(
    models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    whole = LlamaForCausalLM.forward

    def counted(self: LlamaForCausalLM, input_ids: Tensor, **options: object) -> object:
        read.append(input_ids.numel())
        return whole(self, input_ids, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    monkeypatch.setattr(device, "free_bytes", lambda _: 4096)
    with pytest.raises(DeviceError, match="does not fit"):
        Decoder(models["llama"], batch=3, length=100).prefill(tokens(3, 90))
    assert read == [1], "one token of one sequence tells the size of the cache"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_while_a_prompt_is_read(
    error: RuntimeError, models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(models["llama"], batch=2, length=32)
    decoder.prefill(tokens(2, 7))
    mlp = type(models["llama"].model.layers[1].mlp)
    whole = mlp.forward

    def broken(self: nn.Module, x: Tensor) -> Tensor:
        if self is models["llama"].model.layers[1].mlp:
            raise error
        return whole(self, x)

    monkeypatch.setattr(mlp, "forward", broken)
    message = (
        r"ran out[^$]*2 sequences of 32 tokens, prompts of 9[^$]*more memory needed than the [\d,]+ bytes free on cpu"
    )
    with pytest.raises(DeviceError, match=message) as caught:
        decoder.prefill(tokens(2, 9))
    assert caught.value.__context__ is None, "nothing of what was computed is kept alive"
    with pytest.raises(CacheError, match="the cache is empty"):
        decoder.step(torch.zeros(2, dtype=torch.int64))
    monkeypatch.setattr(mlp, "forward", whole)
    decoder.prefill(tokens(2, 9))
    assert decoder.used == 9


def test_models_that_make_the_host_wait_are_not_captured() -> None:
    """The host reads the routing in float32, with other activation functions, and for layouts without kernels."""

    def model(dtype: torch.dtype, *, columns: int = 128, act_fn: nn.Module | None = None) -> nn.Module:
        int4 = SCHEMES["int4_g128"].format
        first, second = (CudaMatrices(int4, 4, n, k, scale_dtype=dtype) for n, k in ((256, 128), (128, 128)))
        other = ExpandedMatrices(int4, 4, 128, columns, scale_dtype=dtype)
        found = nn.Sequential(Experts(first, second if columns == 128 else other, act_fn or nn.SiLU()))
        found.dtype = dtype
        return found

    assert capturable(model(torch.bfloat16))
    assert capturable(model(torch.float16))
    assert not capturable(model(torch.float32))
    assert not capturable(model(torch.bfloat16, columns=96))
    assert not capturable(model(torch.bfloat16, act_fn=nn.GELU()))


def test_rotary_embeddings_that_depend_on_the_length_are_not_captured() -> None:
    scaled = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    config = {"model_type": "llama", **FAMILIES["llama"]}
    assert capturable(random_twin(config, None, dtype=torch.float32, seed=0))
    assert not capturable(random_twin(config | scaled, None, dtype=torch.float32, seed=0))


def test_requesting_an_impossible_capture_is_an_error(
    models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not Decoder(models["deepseek_v3"], batch=1, length=8).captures
    with pytest.raises(CacheError, match=r"cannot be captured[^$]*a model on cpu[^$]*omit `capture`"):
        Decoder(models["deepseek_v3"], batch=1, length=8, capture=True)
    error = _not_capturable(SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32))  # type: ignore[arg-type]
    assert "experts without a kernel for their layout and torch.float32" in str(error)
    assert "load the model in bfloat16" in str(error)


def test_attention_without_support_for_a_fixed_cache_is_an_error() -> None:
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    model = random_twin({"model_type": "qwen2", **FAMILIES["qwen2"]} | windows, None, dtype=torch.float32, seed=0)
    with pytest.raises(CacheError, match=r"does not support a fixed cache[^$]*StaticSlidingWindowLayer"):
        Decoder(model, batch=1, length=16)
    plain = random_twin({"model_type": "llama", **FAMILIES["llama"]}, None, dtype=torch.float32, seed=0)
    plain.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(CacheError, match=r"does not support a fixed cache[^$]*flash_attention_2"):
        Decoder(plain, batch=1, length=16)
