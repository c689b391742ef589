"""Number formats without a kernel: the reasons of each bank, and that every fallback is counted."""

import pytest
import torch

from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.number_format import E4M3, INT4, INT8, ROW, Activations, NumberFormat, block, group
from quantlab.recipe.schemes import SCHEMES
from quantlab.runtime.banks.choice import choose_bank, quantized_matrices
from quantlab.runtime.banks.expanded import ExpandedMatrices
from quantlab.runtime.banks.groups import RowGroups
from quantlab.runtime.banks.int4_native import NativeInt4Matrices
from quantlab.runtime.banks.int4_torch import TorchInt4Matrices
from quantlab.runtime.banks.int8 import Int8Matrices, Int8WeightMatrices
from quantlab.runtime.cuda.banks import CudaMatrices
from quantlab.runtime.inventory import expanded
from quantlab.runtime.load import load
from tests.checkpoints import make_checkpoint

KERNELS = (CudaMatrices, NativeInt4Matrices, TorchInt4Matrices, Int8Matrices, Int8WeightMatrices)
FP8 = NumberFormat(E4M3, block(128, 128), scale="F32", activations=Activations(E4M3, 128))


@pytest.mark.parametrize("bank", KERNELS)
@pytest.mark.parametrize(
    "number",
    [
        FP8,
        NumberFormat(INT8, ROW, symmetric=False),
        NumberFormat(INT8, block(128, 128)),
        NumberFormat(INT4, group(48)),
        NumberFormat(INT4, group(32), activations=Activations(INT8)),
    ],
    ids=lambda number: number.name,
)
def test_banks_decline_unsupported_formats(bank: type, number: NumberFormat) -> None:
    assert bank.can_hold(number, (256, 384), torch.bfloat16)


def test_cuda_kernels_decline_zero_points() -> None:
    """The kernels would treat the integers as symmetric and give wrong products."""
    reason = CudaMatrices.can_hold(NumberFormat(INT4, group(128), symmetric=False), (256, 384), torch.bfloat16)
    assert reason == "the CUDA kernels: no zero points"
    for name in ("int4_g128", "int4_g32", "int8", "int8_weight"):
        assert CudaMatrices.can_hold(SCHEMES[name].format, (256, 384), torch.bfloat16) is None


def test_choose_bank_returns_every_reason() -> None:
    bank, reasons = choose_bank(NumberFormat(INT4, group(32), symmetric=False), (64, 96), torch.float32, "cpu")
    assert bank is None
    assert len(reasons) == 2
    assert reasons[0].startswith("the native int4 kernel: ")
    assert reasons[1].startswith("torch's int4 operator: ")
    bank, reasons = choose_bank(FP8, (128, 128), torch.float32, "cuda")
    assert (bank, reasons) == (None, ("no kernel for FP8 e4m3 on cuda",))


@pytest.mark.parametrize("bits", [4, 8])
def test_expanded_matrices_multiply_with_zero_points(bits: int) -> None:
    torch.manual_seed(0)
    number = NumberFormat(INT4 if bits == 4 else INT8, group(32), symmetric=False)
    bank = quantized_matrices(number, 2, 48, 96, scale_dtype=torch.float32)
    assert isinstance(bank, ExpandedMatrices)
    assert bank.reasons
    half, meant = 1 << bits - 1, []
    for index in range(2):
        q = torch.randint(-half, half, (48, 96), dtype=torch.int8)
        zero = torch.randint(-half, half, (48, 3), dtype=torch.int8)
        scale = torch.rand(48, 3) * 0.02
        bank.fill(index, QuantizedMatrix(q, scale, bits, zero))
        steps = q.double() - zero.double().repeat_interleave(32, 1)
        meant.append(steps * scale.double().repeat_interleave(32, 1))
    x = torch.randn(7, 96)
    found = bank.products(x, RowGroups((1, 0), (3, 4), None))
    expected = torch.cat([x[:3].double() @ meant[1].T, x[3:].double() @ meant[0].T])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    (counted,) = expanded(torch.nn.ModuleList([bank]))
    assert (counted.format, counted.count, counted.held) == (number.name, 2, "packed")
    assert counted.reasons == bank.reasons


def test_fp8_weights_expanded_at_load_are_counted(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model = load(make_checkpoint(tmp_path_factory.mktemp("fp8") / "model", "deepseek_v3"), dtype=torch.float32)
    (counted,) = expanded(model)
    assert (counted.format, counted.held) == ("fp8_block", "dense")
    assert counted.reasons == ("no kernel for FP8 e4m3 on cpu", "activations are not rounded")
    # 3 layers: q_a, q_b, kv_a, kv_b, o; gate_up and down of one MLP, of 2 shared experts and of 2 x 8 routed ones
    assert counted.count == 3 * 5 + 2 * (1 + 2 + 16)


@pytest.mark.parametrize("number", [NumberFormat(INT4, group(32), symmetric=False), NumberFormat(INT8, ROW)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_expanded_matrices_compute_on_their_own_device(number: NumberFormat, dtype: torch.dtype) -> None:
    """On the device without memory, an operator with a tensor of another device is an error."""
    bank = ExpandedMatrices(number, 2, 3000, 512, scale_dtype=torch.bfloat16).to("meta")
    found = bank.products(torch.empty(5, 512, dtype=dtype, device="meta"), RowGroups((1, 0), (2, 3), None))
    assert (found.shape, found.dtype, found.device.type) == ((5, 3000), dtype, "meta")
