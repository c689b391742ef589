"""What is computed band by band equals what is computed at once."""

import pytest
import torch

from quantlab.numerics import bands as bands_module
from quantlab.numerics.bands import bands
from quantlab.numerics.change import change_of
from quantlab.numerics.fp8 import quantize_blocks
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.packing import pack_int32


@pytest.mark.parametrize(("rows", "columns"), [(7, 64), (1, 64), (3, 1000), (0, 64), (4, 0)])
def test_bands_cover_every_row_once(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands_module, "_WEIGHTS", {"cpu": 128})
    covered = [row for band in bands(torch.empty(rows, columns)) for row in range(rows)[band]]
    assert covered == list(range(rows))


@pytest.mark.parametrize("kind", ["plain", "integers", "zero points", "blocks"])
def test_a_change_is_the_same_in_bands_and_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(40, 64, generator=generator)
    q = torch.randint(-8, 8, W.shape, dtype=torch.int8, generator=generator)
    scale = torch.rand(40, 2, generator=generator).bfloat16()
    zero = torch.randint(-8, 8, (40, 2), dtype=torch.int8, generator=generator)
    values, scales = quantize_blocks(W, block=(16, 16))
    result = {
        "plain": W.masked_fill(q > 0, 0),
        "integers": QuantizedMatrix(q, scale, 4),
        "zero points": QuantizedMatrix(q, scale, 4, zero),
        "blocks": QuantizedMatrix(values, scales, 8, block=(16, 16)),
    }[kind]
    after = result if isinstance(result, torch.Tensor) else result.dequantize(torch.float32)
    before = W.clone()
    monkeypatch.setattr(bands_module, "_WEIGHTS", {"cpu": 3 * 64})
    change = change_of(W, result)
    assert torch.equal(W, before)
    assert torch.equal(change.before, before)
    assert torch.equal(change.delta, after - before)
    assert change.nonzero == int(after.count_nonzero()) > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_words_are_the_same_in_bands_and_at_once(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (10, 64), dtype=torch.int8)
    at_once = pack_int32(q, bits=bits)
    monkeypatch.setattr(bands_module, "_WEIGHTS", {"cpu": 3 * 64})
    assert torch.equal(pack_int32(q, bits=bits), at_once)
    assert torch.equal(pack_int32(q.t().contiguous().t(), bits=bits), at_once)
