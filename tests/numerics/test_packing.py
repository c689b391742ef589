"""Packing against compressed-tensors' own packer, in both directions."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from quantlab.numerics.packing import pack_int32, unpack_int32


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 8), (3, 128), (17, 264)])
def test_same_words_as_compressed_tensors(bits: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), shape, dtype=torch.int8)
    q[0, 0], q[-1, -1] = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    words = pack_int32(q, bits=bits)
    assert torch.equal(words, pack_to_int32(q, bits))
    assert torch.equal(unpack_int32(words, bits=bits, columns=shape[1]), q)
    assert torch.equal(unpack_from_int32(words, bits, torch.Size(shape)), q)


def test_padding_of_foreign_words_is_dropped() -> None:
    q = torch.tensor([[-8, 7, 0]], dtype=torch.int8)
    assert torch.equal(unpack_int32(pack_to_int32(q, 4), bits=4, columns=3), q)


def test_strides_do_not_matter() -> None:
    """A matrix of one row or one column counts as contiguous with any strides."""
    q = torch.randint(-8, 8, (8, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    for view in (q[:, :8].T, q.T[:1, :8], q[:1, ::2].contiguous(), q[::2, 8:], q[:, 0].view(1, 8)):
        plain = torch.tensor(view.tolist(), dtype=torch.int8)
        assert torch.equal(pack_int32(view, bits=4), pack_int32(plain, bits=4))
