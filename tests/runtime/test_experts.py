"""The experts module, compared with a loop over tokens."""

import pytest
import torch
from torch import Tensor, nn

import quantlab.runtime.modules.experts
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.recipe.schemes import SCHEMES, SchemeName
from quantlab.runtime.banks.choice import Matrices, quantized_matrices
from quantlab.runtime.banks.dense import DenseMatrices
from quantlab.runtime.modules.experts import Experts

COUNT, HIDDEN, WIDTH, TOP_K = 9, 128, 64, 3


def fake_int8(x: Tensor) -> Tensor:
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, (x.float() / scale).round() * scale, 0).double()


def build(scheme: SchemeName | None, dtype: torch.dtype) -> tuple[Experts, Tensor, Tensor]:
    """Experts and their dequantized float64 weights: gate_up [E, 2I, H] and down [E, H, I]."""
    generator = torch.Generator().manual_seed(0)
    banks: list[Matrices] = []
    meant = []
    for rows, columns in ((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)):
        if scheme is None:
            weight = torch.randn(COUNT, rows, columns, generator=generator).mul(0.1).to(dtype)
            dense = DenseMatrices(COUNT, rows, columns, dtype)
            for index in range(COUNT):
                dense.fill(index, weight[index])
            banks.append(dense)
            meant.append(weight.double())
            continue
        chosen = SCHEMES[scheme].format
        q = torch.randint(-7, 8, (COUNT, rows, columns), generator=generator, dtype=torch.int8)
        scale = torch.rand(COUNT, rows, chosen.groups(columns), generator=generator).mul(0.02).bfloat16()
        bank = quantized_matrices(chosen, COUNT, rows, columns, scale_dtype=torch.bfloat16)
        for index in range(COUNT):
            bank.fill(index, QuantizedMatrix(q[index], scale[index], chosen.bits))
        banks.append(bank)
        exact = (
            torch.float64 if scheme == "int8" else torch.bfloat16
        )  # integers are multiplied exactly, expanded weights in the scale's dtype
        meant.append((q.to(exact) * scale.to(exact).repeat_interleave(columns // scale.shape[2], dim=2)).double())
    return Experts(banks[0], banks[1], nn.SiLU()), meant[0], meant[1]


def expected(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *, int8: bool) -> Tensor:
    rounded = fake_int8 if int8 else torch.Tensor.double
    result = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for expert, weight in zip(index[token].tolist(), weights[token].tolist(), strict=True):
            gate, up = (gate_up[expert] @ rounded(x[token])).chunk(2)
            result[token] += weight * (down[expert] @ rounded(nn.functional.silu(gate) * up))
    return result


def routed(tokens: int, kind: str) -> Tensor:
    if kind == "one":  # all tokens to the same experts
        return torch.tensor([[4, 0, 8]]).expand(tokens, -1).contiguous()
    generator = torch.Generator().manual_seed(tokens)
    return torch.stack(
        [torch.randperm(COUNT - 2, generator=generator)[:TOP_K] + 1 for _ in range(tokens)]
    )  # 0 and 8 stay empty


@pytest.mark.parametrize("kind", ["one", "spread"])
@pytest.mark.parametrize("tokens", [1, 2, 50, 150])
@pytest.mark.parametrize("scheme", [None, "int8", "int8_weight", "int4_g64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_experts_equal_a_loop_over_tokens(
    scheme: SchemeName | None, tokens: int, kind: str, dtype: torch.dtype
) -> None:
    experts, gate_up, down = build(scheme, dtype)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    index, weights = routed(tokens, kind), torch.rand(tokens, TOP_K, generator=generator)
    found = experts(x, index, weights)
    assert found.dtype == dtype
    truth = expected(x, index, weights, gate_up, down, int8=scheme == "int8")
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 3e-2}[dtype]
    assert (found.double() - truth).abs().max() <= tolerance * truth.abs().max()


def test_no_tokens() -> None:
    experts, _, _ = build("int4_g64", torch.bfloat16)
    assert experts(
        torch.empty(0, HIDDEN).bfloat16(), torch.empty(0, TOP_K, dtype=torch.int64), torch.empty(0, TOP_K)
    ).shape == (0, HIDDEN)


def test_many_tokens_are_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, _, _ = build("int4_g64", torch.float32)
    x, weights = torch.randn(50, HIDDEN), torch.rand(50, TOP_K)
    whole = experts(x, routed(50, "spread"), weights)
    monkeypatch.setattr(quantlab.runtime.modules.experts, "_ROWS_AT_ONCE", 20)
    assert torch.allclose(experts(x, routed(50, "spread"), weights), whole, atol=1e-6)
