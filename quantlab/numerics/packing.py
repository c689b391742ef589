"""Small integers packed into int32 words, as compressed-tensors' `pack-quantized` format stores them.

Value j of a word occupies bits [j*b, (j+1)*b), lowest first, as the unsigned number ``q + 2^(b-1)``. Rows are packed
along K; K is a multiple of 32/b in every layout quantlab writes. Numbers lie in memory lowest byte first, as in safetensors.
"""

import torch
from torch import Tensor

from quantlab.numerics.bands import bands


def pack_int32(q: Tensor, *, bits: int) -> Tensor:
    """[N, K] int8 with values in [-2^(b-1), 2^(b-1)) -> [N, K*b/32] int32."""
    rows, columns = q.shape
    per_word = 32 // bits
    assert bits in {4, 8}, f"{bits} bits"
    assert columns % per_word == 0, f"{columns} columns do not fill words of {per_word} values"
    words = torch.empty(rows, columns // per_word, dtype=torch.int32, device=q.device)
    for band in bands(q):
        unsigned = (q[band] + (1 << (bits - 1))).reshape(-1)  # modulo 256
        if bits == 4:  # two neighbours in one byte
            pairs = unsigned.view(torch.int16)
            unsigned = (pairs | pairs >> 4).to(torch.uint8)
        words[band] = unsigned.view(torch.int32).view(-1, columns // per_word)
    return words


def unpack_int32(words: Tensor, *, bits: int, columns: int) -> Tensor:
    """[N, ceil(K*b/32)] int32 -> [N, K] int8, the inverse of `pack_int32`; values past `columns` are padding."""
    per_word = 32 // bits
    mask = (1 << bits) - 1
    parts = [((words >> (position * bits)) & mask).to(torch.int16) - (1 << (bits - 1)) for position in range(per_word)]
    return torch.stack(parts, dim=-1).view(words.shape[0], -1)[:, :columns].to(torch.int8)
