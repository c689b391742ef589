"""Fused decode steps: kernels compared with float64, whole steps with transformers' forward, on the CPU and on CUDA."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from quantlab.architectures.detect import of_model_type
from quantlab.architectures.layer import RotaryLayout, Routing
from quantlab.numerics.number_format import INT4, INT8, ROW, NumberFormat, group
from quantlab.recipe.schemes import SCHEMES, Scheme, SchemeName
from quantlab.runtime.decode import Decoder
from quantlab.runtime.decoding import fused_step
from quantlab.runtime.decoding.fusable_parts import ModelParts, parts_of
from quantlab.runtime.decoding.fused_step import _kernels
from quantlab.runtime.decoding.kernel_interface import CachePosition, Latents, RowNorm
from quantlab.runtime.load import load
from quantlab.runtime.modules.experts import Experts
from quantlab.runtime.native.library import library, status
from tests.runtime.tiny import FAMILIES, Artifact, quantize, tokens, write_checkpoint

pytestmark = pytest.mark.usefixtures("two_threads")

Maker = Callable[[str, SchemeName], Artifact]
FOREIGN = (
    Scheme(NumberFormat(INT4, ROW), "pack-quantized", "signed"),
    *(Scheme(NumberFormat(INT8, group(size)), "pack-quantized", "absmax") for size in (128, 64, 32)),
)
"""Formats that the runtime reads but recipes cannot name."""
DTYPES = (torch.bfloat16, torch.float16)
DEVICES = (
    pytest.param("cpu", marks=pytest.mark.skipif(library() is None, reason=status())),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device under test, set as torch's default device."""
    torch.manual_seed(0)
    if request.param == "cuda":
        request.getfixturevalue("poisoned_gpu")
    with torch.device(request.param):
        yield torch.device(request.param)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding of x [..., D] in float64: rotate its halves by angles [..., D / 2]."""
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = angles.double().cos(), angles.double().sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def in_halves(x: Tensor, *, pairs: bool) -> Tensor:
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1) if pairs else x


def softmaxed(scores: Tensor, cache_position: CachePosition) -> Tensor:
    """Softmax of scores [B, ..., S] over the positions from padding to position."""
    where = torch.arange(scores.shape[-1])
    seen = (where <= cache_position.index) & (where >= cache_position.padding)
    return scores.masked_fill(~seen.view(seen.shape[0], *(1 for _ in scores.shape[2:]), -1), float("-inf")).softmax(-1)


def cache_position_at(position: int, batch: int, pairs: int) -> tuple[CachePosition, Tensor]:
    """A cache position with some padding, and the rotary angles [B, n] of its tokens."""
    padding = torch.randint(0, min(position, 4) + 1, (batch, 1))
    table = 6 * torch.rand(position + 1, pairs)
    angles = table[position - padding[:, 0]]
    read = angles if angles.is_cuda else table  # the CPU reads a table of all places
    arrived = torch.zeros(4096, dtype=torch.int32)
    return CachePosition(read.cos(), read.sin(), torch.tensor([position]), padding, arrived), angles


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "key_heads", "per_key", "width", "length", "position"),
    [
        (1, 32, 1, 128, 144, 128),
        (16, 8, 4, 128, 300, 5),
        (2, 2, 3, 32, 200, 150),
        (1, 4, 1, 48, 70, 69),
        (3, 1, 20, 16, 4097, 4000),
        (70, 2, 7, 64, 128, 64),
    ],
)
def test_attention_to_a_cache_it_writes(
    batch: int,
    key_heads: int,
    per_key: int,
    width: int,
    length: int,
    position: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    heads = key_heads * per_key
    sizes = [heads * width, key_heads * width, key_heads * width]
    q, k, v = torch.randn(batch, sum(sizes)).to(dtype).split(sizes, dim=1)
    keys, values = (torch.randn(batch, key_heads, length, width).to(dtype) for _ in range(2))
    cache_position, angles = cache_position_at(position, batch, width // 2)
    expected_keys, expected_values = keys.clone(), values.clone()
    expected_keys[:, :, position] = turned(k.view(batch, key_heads, width), angles[:, None]).to(dtype)
    expected_values[:, :, position] = v.view(batch, key_heads, width)
    for _ in range(2):
        found = _kernels(device).attend(q, k, v, cache_position, keys, values, width**-0.5)
    query = turned(q.view(batch, heads, width), angles[:, None]).view(batch, key_heads, per_key, width)
    scores = torch.einsum("bgpd,bgsd->bgps", query, expected_keys.double()) * width**-0.5
    expected = torch.einsum("bgps,bgsd->bgpd", softmaxed(scores, cache_position), expected_values.double()).reshape(
        batch, -1
    )
    assert error(found, expected) < (1e-2 if dtype == torch.bfloat16 else 2e-3)
    assert error(keys, expected_keys.double()) < 1e-3, "an ulp of few numbers"
    assert torch.equal(values, expected_values)
    assert not cache_position.arrived.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairs", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize(
    ("batch", "heads", "nope", "turned_width", "latent", "length", "position"),
    [
        (1, 128, 128, 64, 512, 144, 128),
        (5, 16, 128, 64, 512, 1000, 900),
        (2, 20, 32, 16, 128, 100, 77),
        (1, 3, 8, 32, 48, 40, 39),
    ],
)
def test_attention_to_latents(
    batch: int,
    heads: int,
    nope: int,
    turned_width: int,
    latent: int,
    length: int,
    position: int,
    pairs: tuple[bool, bool],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    kernels = _kernels(device)
    columns, value = 200, 24
    q_a, kv = torch.randn(batch, columns + latent + turned_width).to(dtype).split([columns, latent + turned_width], 1)
    norms = [torch.randn(size).to(dtype) for size in (latent, columns)]
    latents = torch.randn(batch, 1, length, latent).to(dtype)
    rotary = torch.randn(batch, 1, length, turned_width).to(dtype)
    cache_position, angles = cache_position_at(position, batch, turned_width // 2)
    cache = Latents(latents, rotary, RotaryLayout(*pairs))
    others = latents.clone(), rotary.clone()
    by = [RowNorm(norm, 1e-5) for norm in norms]
    normed = kernels.write_latents(kv, by[0], cache_position, cache, q_a, by[1])
    for found, read, norm in ((latents[:, 0, position], kv[:, :latent], norms[0]), (normed, q_a, norms[1])):
        wide = read.double()
        assert error(found, wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.double()) < 5e-3
    key = turned(in_halves(kv[:, latent:], pairs=pairs[0]), angles)
    assert error(in_halves(rotary[:, 0, position], pairs=pairs[1]), key) < 5e-3
    for before, after in zip(others, (latents, rotary), strict=True):
        before[:, 0, position] = after[:, 0, position]
        assert torch.equal(before, after), "only the new place is written"
    weight = (torch.randn(heads, nope + value, latent) * nope**-0.5).to(dtype)
    q = torch.randn(batch, heads, nope + turned_width).to(dtype)
    query = turned(in_halves(q[..., nope:], pairs=pairs[0]), angles[:, None])
    q_latent = torch.einsum("bhn,hnl->bhl", q[..., :nope].double(), weight[:, :nope].double())
    scores = torch.einsum("bhl,bsl->bhs", q_latent, latents[:, 0].double())
    scores += torch.einsum("bhr,bsr->bhs", query, in_halves(rotary[:, 0], pairs=pairs[1]).double())
    seen = torch.einsum("bhs,bsl->bhl", softmaxed(scores * 0.05, cache_position), latents[:, 0].double())
    expected = torch.einsum("bhl,hvl->bhv", seen, weight[:, nope:].double()).flatten(1)
    found = kernels.attend_absorbed(q, weight, cache_position, cache, 0.05)
    assert error(found, expected) < (2e-2 if dtype == torch.bfloat16 else 3e-3)
    assert not cache_position.arrived.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("family", "router", "experts", "groups", "top_groups", "top_k", "method"),
    [
        ("deepseek_v3", DeepseekV3TopkRouter, 32, 4, 2, 5, None),
        ("deepseek_v3", DeepseekV3TopkRouter, 256, 8, 4, 8, None),
        ("deepseek_v2", DeepseekV2TopkRouter, 64, 1, 1, 6, "greedy"),
        ("deepseek_v2", DeepseekV2TopkRouter, 64, 8, 3, 6, "greedy"),
        ("deepseek_v2", DeepseekV2TopkRouter, 160, 8, 3, 6, "group_limited_greedy"),
    ],
)
def test_the_router_chooses_the_same_experts_as_transformers(
    family: str,
    router: type,
    experts: int,
    groups: int,
    top_groups: int,
    top_k: int,
    method: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    hidden = 1100
    config = SimpleNamespace(
        num_experts_per_tok=top_k, num_experts=experts, num_local_experts=experts, hidden_size=hidden, routed_scaling_factor=2.5,
        n_group=groups, topk_group=top_groups, norm_topk_prob=True, topk_method=method,
    )  # fmt: skip
    module = router(config).to(device)
    module.weight.data = torch.randn(experts, hidden).mul_(hidden**-0.5).to(dtype)
    bias = getattr(module, "e_score_correction_bias", None)
    if bias is not None:
        bias.normal_(std=0.1)
    architecture = of_model_type(family)
    assert architecture is not None
    assert architecture.mixture is not None
    routing = architecture.mixture.routing(vars(config) | {"n_routed_experts": experts})
    choose = _kernels(device).router(module.weight.data, bias, routing)
    for batch in (1, 16, 16):
        x = torch.randn(batch, hidden).to(dtype)
        index, weights = choose(x)
        with torch.no_grad():
            _, expected_weights, expected = module(x)
        order, expected_order = index.argsort(-1), expected.argsort(-1)
        assert torch.equal(index.gather(1, order), expected.gather(1, expected_order))
        assert torch.allclose(weights.gather(1, order), expected_weights.gather(1, expected_order), rtol=1e-4)


def test_a_token_of_nans_does_not_affect_other_tokens(device: torch.device) -> None:
    experts, hidden = 32, 256
    x = torch.randn(3, hidden).bfloat16()
    x[1] = float("nan")
    weight, bias = torch.randn(experts, hidden).bfloat16(), torch.zeros(experts)
    routing = Routing(
        experts,
        5,
        groups=4,
        top_groups=2,
        group_score=2,
        scoring="sigmoid",
        corrected=True,
        normalised=True,
        scaling=2.5,
    )
    index, weights = _kernels(device).router(weight, bias, routing)(x)
    assert all(len(set(row)) == 5 and set(row) <= set(range(experts)) for row in index.tolist())
    assert weights.isnan().all(dim=1).tolist() == [False, True, False]


def same_steps(directory: Path, dtype: torch.dtype, device: str = "cpu", *, limit: float) -> PreTrainedModel:
    """Compare fused steps with transformers' steps, and both with float32; each sequence has its own padding.

    On a rounding a router may send a token elsewhere, and its logits are then others; the median step of a sequence
    says how the rest do.
    """
    model, exact = (load(directory, dtype=each, device=device) for each in (dtype, torch.float32))
    assert isinstance(parts_of(model), ModelParts), parts_of(model)
    routed = any(isinstance(module, Experts) for module in model.modules())
    for batch in (1, 3, 70):
        ids = tokens(batch, 20).to(device)
        decoders = [
            Decoder(exact, batch=batch, length=32, capture=False, fuse=False),
            Decoder(model, batch=batch, length=32, capture=False, fuse=False),
            Decoder(model, batch=batch, length=32, capture=device == "cuda"),
        ]
        assert [decoder.fuses for decoder in decoders] == [False, False, True]
        for padded in (5, 5, 3):  # the same again, then others in the same cache
            mask = (torch.arange(7) >= torch.arange(batch)[:, None] % padded).to(torch.int64)
            _, one, other = (decoder.prefill(ids[:, :7], mask) for decoder in decoders)
            assert torch.equal(one, other)
            each = []
            for position in range(7, 20):
                exact_step, one, other = (decoder.step(ids[:, position]).float() for decoder in decoders)
                pairs = ((one, exact_step), (other, exact_step), (other, one))
                each.append(torch.stack([(step - of).norm(dim=-1) / of.norm(dim=-1) for step, of in pairs]))
            errors = torch.stack(each, dim=1)
            assert errors[2].median(dim=0).values.max() <= limit, batch
            if device == "cpu":  # on a GPU the largest of 900 was 1.52 limits, both as near to float32 as the rest
                assert routed or errors[2].max() <= 1.5 * limit, batch
            theirs, ours = errors[:2].median(dim=1).values if routed else errors[:2].mean(dim=1)
            assert (ours / theirs).max() <= 1.5, batch
            assert batch < 70 or ours.mean() <= 1.25 * theirs.mean()
            assert routed or errors[1].max() <= 1.6 * errors[0].max(), batch
            for decoder in decoders:
                decoder.rewind(7)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", [None, "int4_g128", "int4_g32", "int8", "int8_weight"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device", DEVICES)
def test_fused_steps_equal_steps_of_transformers(
    family: str,
    scheme: SchemeName | None,
    dtype: torch.dtype,
    device: str,
    artifacts: Maker,
    checkpoints: dict[str, Path],
) -> None:
    directory = checkpoints[family] if scheme is None else artifacts(family, scheme).directory
    rounds = torch.bfloat16 if device == "cpu" and scheme else dtype  # packed products on the CPU round what they read
    limit = 0.06 if scheme == "int8" else 0.02 if rounds == torch.bfloat16 else 5e-3
    same_steps(directory, dtype, device, limit=limit)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [*FOREIGN, SCHEMES["int4_g128_asym"]], ids=lambda one: one.name)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.skipif(library() is None, reason=status())
def test_steps_with_expanded_matrices_are_not_recorded(
    family: str, scheme: Scheme, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Formats without native kernels; every step reads the routing again."""
    model = same_steps(
        quantize(checkpoints[family], tmp_path / "artifact", scheme).directory, torch.float16, limit=0.02
    )
    decoder = Decoder(model, batch=1, length=32)
    decoder.prefill(tokens(1, 7))
    decoder.step(tokens(1, 8)[:, 7])
    assert decoder._fused is not None
    weights = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    kept = [] if decoder._fused._recorded is None else decoder._fused._recorded[1]._kept
    made = [one.untyped_storage() for one in kept if one.untyped_storage().data_ptr() not in weights]
    assert max((memory.nbytes() for memory in made), default=0) < 8192, "activations, and no matrix"


@pytest.mark.skipif(library() is None, reason=status())
def test_a_step_that_reads_tensors_in_python_is_not_recorded(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python reads the experts of the token, so the step continues without a recording."""
    scheme = next(one for one in FOREIGN if one.name == "int8_weight_g128")
    model = load(quantize(checkpoints["deepseek_v2"], tmp_path / "artifact", scheme).directory, dtype=torch.float16)
    monkeypatch.setattr(fused_step, "_is_recordable", lambda *_: True)
    ids = tokens(1, 20)
    decoders = [Decoder(model, batch=1, length=32, fuse=fuse) for fuse in (False, True)]
    for decoder in decoders:
        decoder.prefill(ids[:, :7])
    for position in range(7, 20):
        one, other = (decoder.step(ids[:, position]) for decoder in decoders)
        assert (one - other).float().norm() <= 0.02 * one.float().norm()
    assert decoders[1]._fused is not None
    assert decoders[1]._fused._recorded is None


YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0,
    "mscale": 0.7, "mscale_all_dim": 0.7,
}  # fmt: skip
OTHERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "heads of 24": ("llama", {"head_dim": 24, "num_key_value_heads": 1}),
    "llama with yarn": ("llama", {"rope_parameters": {k: v for k, v in YARN.items() if "mscale" not in k}}),
    "qwen3 with heads of 24, biases, a tied head": (
        "qwen3",
        {"head_dim": 24, "num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "v2 with yarn, a latent of queries, biases": (
        "deepseek_v2",
        {"rope_parameters": YARN, "q_lora_rank": 48, "attention_bias": True, "mlp_bias": True},
    ),
    "v2 with groups of three experts": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_routed_experts": 12, "n_group": 4, "topk_group": 2},
    ),
    "v3 without a latent of queries, with biases": ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True}),
    "v3 with yarn, rotary halves, 18 experts": (
        "deepseek_v3",
        {"rope_parameters": YARN, "rope_interleave": False, "n_routed_experts": 18, "n_group": 3, "topk_group": 2},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("device", DEVICES)
def test_configs_of_other_kinds(name: str, device: str, tmp_path: Path) -> None:
    family, changes = OTHERS[name]
    same_steps(write_checkpoint(tmp_path, family, **changes), torch.float16, device, limit=5e-3)
