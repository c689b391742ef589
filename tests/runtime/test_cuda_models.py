"""Whole models on CUDA: logits, memory of loading, captured steps. Skipped where there is no GPU."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantlab.recipe.schemes import SCHEMES, SchemeName
from quantlab.runtime.account import weight_bytes
from quantlab.runtime.decode import Decoder
from quantlab.runtime.load import load
from quantlab.runtime.twin import random_twin
from tests.runtime.test_twin import WIDE, quantization
from tests.runtime.tiny import FAMILIES, Artifact, dense_reference, relative_error, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
Maker = Callable[[str, SchemeName], Artifact]


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


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "llama"])
def test_sixteen_bits_stay_close_to_the_cpu(
    family: str, scheme: SchemeName | None, artifacts: Maker, checkpoints: dict[str, Path]
) -> None:
    directory = checkpoints[family] if scheme is None else artifacts(family, scheme).directory
    with torch.no_grad():
        found = load(directory, dtype=torch.bfloat16, device="cuda")(input_ids=tokens().cuda()).logits.float().cpu()
        expected = load(directory, dtype=torch.float32)(input_ids=tokens()).logits
    # routing can flip a token's expert on a rounding
    assert (found - expected).norm() / expected.norm() <= (0.05 if family == "llama" else 0.25)


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
        assert held <= 1.3 * weight_bytes(model).total + 2**20, "torch rounds small tensors up"
        assert torch.cuda.max_memory_allocated() - before <= held + 12 * 256 * 128 + 2**20
        del model


@pytest.mark.parametrize(("scheme", "limit"), [("int4_g128", 27), ("int8", 52), ("int8_weight", 52)])
def test_weights_take_the_bytes_of_their_format(scheme: SchemeName, limit: float) -> None:
    counted = weight_bytes(random_twin(WIDE, quantization(scheme), dtype=torch.bfloat16, seed=0, device="cuda"))
    assert 100 * counted.quantized / counted.quantized_fp16 <= limit
