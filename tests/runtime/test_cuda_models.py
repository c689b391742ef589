"""Whole models on CUDA: logits, memory of loading, captured steps. Skipped where there is no GPU."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantlab.recipe.schemes import SchemeName
from quantlab.runtime.decode import Decoder
from quantlab.runtime.inventory import weight_bytes
from quantlab.runtime.load import load
from quantlab.runtime.twin import random_twin
from tests.checkpoints import INTEGERS
from tests.runtime.test_twin import WIDE, quantization
from tests.runtime.tiny import FAMILIES, Artifact, dense_reference, relative_error, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
Maker = Callable[[str, SchemeName], Artifact]
# 650 MB in 16 bits, mostly experts of V2-Lite's width
LARGE = WIDE | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 32,
}


@pytest.mark.parametrize("scheme", ["int4_g128", "int4_g32", "int8_weight"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_logits_equal_the_dense_model(family: str, scheme: SchemeName, artifacts: Maker) -> None:
    artifact = artifacts(family, scheme)
    model = load(artifact.directory, dtype=torch.float32, device="cuda")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cuda"}
    with torch.no_grad():
        found = model(input_ids=tokens().cuda()).logits.cpu()
        expected = dense_reference(artifact.dense)(input_ids=tokens()).logits
    assert relative_error(found, expected) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [None, *INTEGERS])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "llama"])
def test_sixteen_bits_compute_what_the_dense_model_does(
    family: str,
    scheme: SchemeName | None,
    dtype: torch.dtype,
    artifacts: Maker,
    checkpoints: dict[str, Path],
) -> None:
    """Packed against dequantized weights, both in 16 bits on CUDA; the plain checkpoint against transformers' own
    model.

    Rounding may make the router select other experts for a token, which changes its logits. So the median over tokens
    is compared.
    """
    ids = tokens(8, 32).cuda()
    with torch.no_grad():
        if scheme is None:
            found = load(checkpoints[family], dtype=dtype, device="cuda")(input_ids=ids).logits.float()
            expected = dense_reference(checkpoints[family]).to("cuda", dtype)(input_ids=ids).logits.float()
        else:
            artifact = artifacts(family, scheme)
            found = load(artifact.directory, dtype=dtype, device="cuda")(input_ids=ids).logits.float()
            expected = load(artifact.dense, dtype=dtype, device="cuda")(input_ids=ids).logits.float()
    relative = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    # the scheme int8 quantizes activations, the dense model does not
    assert relative.median() <= (0.06 if scheme == "int8" else 0.03)


@pytest.mark.parametrize("scheme", [None, "int4_g128", "int8", "int8_weight"])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "llama"])
def test_captured_steps_equal_steps_that_are_not(
    family: str, scheme: SchemeName | None, artifacts: Maker, checkpoints: dict[str, Path]
) -> None:
    directory = checkpoints[family] if scheme is None else artifacts(family, scheme).directory
    model = load(directory, dtype=torch.bfloat16, device="cuda")
    for batch in (1, 3):
        mask = torch.ones(batch, 7, dtype=torch.int64)
        mask[0, : batch - 1] = 0
        plain, captured = (Decoder(model, batch=batch, length=32, capture=capture) for capture in (False, True))
        ids = tokens(batch, 20)
        one, other = plain.prefill(ids[:, :7], mask), captured.prefill(ids[:, :7], mask)
        assert torch.equal(one, other)
        for _ in range(2):
            for position in range(7, 20):
                one, other = (decoder.step(ids[:, position].cuda()) for decoder in (plain, captured))
                assert (one - other).float().norm() <= 1e-3 * one.float().norm()
            plain.rewind(7)
            captured.rewind(7)


def test_loading_takes_the_model_and_one_matrix(artifacts: Maker) -> None:
    for scheme in ("int4_g128", "int8", "int8_weight"):
        directory = artifacts("llama", scheme).directory
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model = load(directory, device="cuda")
        held = torch.cuda.memory_allocated() - before
        assert held <= 1.3 * weight_bytes(model).total + 2**20, "the allocator rounds small tensors up"
        assert torch.cuda.max_memory_allocated() - before <= held + 12 * 256 * 128 + 2**20
        del model


@pytest.mark.parametrize(("scheme", "limit"), [("int4_g128", 27), ("int8", 52), ("int8_weight", 52)])
def test_weights_take_the_bytes_of_their_format(scheme: SchemeName, limit: float) -> None:
    counted = weight_bytes(random_twin(WIDE, quantization(scheme), dtype=torch.bfloat16, seed=0, device="cuda"))
    assert 100 * counted.quantized / counted.quantized_fp16 <= limit


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("scheme", ["int4_g128", "int8", "int8_weight"])
def test_a_decode_step_expands_nothing(scheme: SchemeName, capture: bool) -> None:
    """Peak memory of whole steps, including the first and its capture; a fifth of a copy is left for workspaces."""
    model = random_twin(LARGE, quantization(scheme), dtype=torch.bfloat16, seed=0, device="cuda")
    in_16_bits = weight_bytes(model).quantized_fp16
    decoder = Decoder(model, batch=4, length=64, capture=capture)
    decoder.prefill(tokens(4, 16))
    gc.collect()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for position in range(3):
        decoder.step(tokens(4, 16)[:, position].cuda())
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - held < 0.2 * in_16_bits
