"""Twins with random weights: packed, finite, and with the bytes of their number format."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from quantlab.formats.compressed_tensors import QuantizationConfig
from quantlab.recipe.schemes import SCHEMES, SchemeName
from quantlab.runtime.inventory import weight_bytes
from quantlab.runtime.load import load
from quantlab.runtime.modules.experts import Experts
from quantlab.runtime.twin import random_twin
from tests.checkpoints import INTEGERS, all_linears
from tests.runtime.tiny import FAMILIES, IGNORE, Artifact, tokens

# wide enough that scales, not norms and biases, decide the ratio
WIDE = {
    "model_type": "deepseek_v2",
    **FAMILIES["deepseek_v2"],
    "hidden_size": 1024,
    "kv_lora_rank": 192,
    "qk_rope_head_dim": 64,
    "num_attention_heads": 16,
}
LIMITS: dict[SchemeName, float] = {
    "int8": 52,
    "int8_weight": 52,
    "int4_g128": 27,
    "int4_g64": 28.2,
    "int4_g32": 31.3,
    "int4_g128_asym": 29.5,
    "int4_g64_asym": 32.1,
    "int4_g32_asym": 39.1,
}
"""Percent of float16. With zero points torch's operator reads a pair of bfloat16 numbers per group, and the bank holds their
remainders and the zero points beside them: 72 bits per group, which groups of 32 and 64 pay for."""


def quantization(scheme: SchemeName | None) -> QuantizationConfig | None:
    return None if scheme is None else all_linears(SCHEMES[scheme], IGNORE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", [None, *INTEGERS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_twins_compute_finite_numbers_that_vary(family: str, scheme: SchemeName | None, dtype: torch.dtype) -> None:
    model = random_twin({"model_type": family, **FAMILIES[family]}, quantization(scheme), dtype=dtype, seed=3)
    with torch.inference_mode():
        logits = model(input_ids=tokens()).logits.float()
    assert torch.isfinite(logits).all()
    tied = FAMILIES[family].get("tie_word_embeddings", False)
    assert 0.01 < logits.std() < (256 * 128**0.5 * 2 if tied else 100), "a tied head has the size of the embeddings"


def test_a_twin_depends_on_its_seed_only() -> None:
    config = {"model_type": "deepseek_v3", **FAMILIES["deepseek_v3"]}
    with torch.inference_mode():
        first, again, other = (
            random_twin(config, quantization("int4_g128"), dtype=torch.bfloat16, seed=seed)(input_ids=tokens()).logits
            for seed in (0, 0, 1)
        )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_twins_of_all_formats_route_tokens_to_the_same_experts(family: str) -> None:
    """Otherwise one twin would read more experts than another, which would distort ratios of their times."""
    config = {"model_type": family, **FAMILIES[family], "num_hidden_layers": 6}
    chosen: dict[SchemeName | None, list[torch.Tensor]] = {}
    for scheme in (None, *INTEGERS):
        dtype = torch.bfloat16 if scheme else torch.float16
        model = random_twin(config, quantization(scheme), dtype=dtype, seed=0)
        seen = chosen.setdefault(scheme, [])
        for module in model.modules():
            if isinstance(module, Experts):
                module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[1].sort().values))
        with torch.inference_mode():
            model(input_ids=torch.arange(64)[None])
    for scheme in INTEGERS:
        alike = torch.cat([(a == b).flatten() for a, b in zip(chosen[scheme], chosen[None], strict=True)])
        assert alike.float().mean() > 0.9, scheme
    assert len(torch.cat(chosen[None]).unique()) == config["n_routed_experts"], "and to all of them"


@pytest.mark.parametrize(("scheme", "limit"), LIMITS.items())
def test_quantized_weights_take_the_bytes_of_their_format(scheme: SchemeName, limit: float) -> None:
    held = weight_bytes(random_twin(WIDE, quantization(scheme), dtype=torch.bfloat16, seed=0))
    plain = weight_bytes(random_twin(WIDE, None, dtype=torch.bfloat16, seed=0))
    assert 100 * held.quantized / held.quantized_fp16 <= limit
    assert held.total - held.quantized == held.fp16 - held.quantized_fp16, "what is not quantized has two bytes each"
    assert held.fp16 == plain.fp16 == plain.total
    assert plain.quantized == plain.quantized_fp16 == 0


def test_a_model_holds_at_most_the_bytes_of_its_artifact(artifacts: Callable[[str, SchemeName], Artifact]) -> None:
    for scheme in ("int4_g128", "int8", "int8_weight"):
        directory = artifacts("llama", scheme).directory
        stored = (directory / "model.safetensors").stat().st_size
        assert weight_bytes(load(directory)).total <= 1.05 * stored


def test_a_tied_head_counts_once() -> None:
    config = {"model_type": "qwen2", **FAMILIES["qwen2"]}
    tied, untied = (
        weight_bytes(random_twin(config | {"tie_word_embeddings": tie}, None, dtype=torch.bfloat16, seed=0))
        for tie in (True, False)
    )
    assert untied.total - tied.total == 96 * 128 * 2


@pytest.mark.slow
def test_importing_the_runtime_does_nothing() -> None:
    code = (
        "import os, torch, transformers; before = dict(os.environ), torch.get_num_threads(), torch.get_rng_state().sum()\n"
        "import quantlab.runtime.load, quantlab.runtime.twin, quantlab.runtime.inventory\n"
        "assert before == (dict(os.environ), torch.get_num_threads(), torch.get_rng_state().sum())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
