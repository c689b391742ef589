"""Memory layout of packed integers on the device.

A matrix is stored as consecutive blocks of 128 columns, each as consecutive slabs of 64 rows. K and N are padded to
whole slabs. A slab of int4 holds 64 x 32 words of 16 bits; word [r, c] packs columns c, c + 32, c + 64 and c + 96 of
row r, lowest bits first, each as q + 8. A slab of int8 holds 64 x 64 words; word [r, c] packs columns c and c + 64.

Within a slab, words are in the order of the tensor-core fragments of 128 threads (m64n_k16 with the weights in
registers, PTX ISA "Register fragments for wgmma"; m16n8k16 of older devices is the same per warp). Of each 16 columns,
thread 32 v + 4 i + j of warp v multiplies columns 2 j, 2 j + 1, 2 j + 8, 2 j + 9 of rows 16 v + i and 16 v + i + 8.
These eight words are contiguous, 16 bytes, and follow those of the previous thread.

int8 weights for int8 activations are read by the tensor cores without conversion and stored by rows:
``[K / 128, N, 128]``.
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

BLOCK: Final = 128
"""Columns per block."""
SLAB: Final = 64
"""Rows per slab."""

_ROW: Final = (4, 2, 8)
_COLUMN: Final = (2, 4, 2)
"""Factors of a row index in a slab, (warp, half, i), and of a column index within 16, (half, j, odd)."""


def blocks(columns: int) -> int:
    """The number of blocks of `columns` columns."""
    return -(-columns // BLOCK)


def slabs(rows: int) -> int:
    """The number of slabs of `rows` rows."""
    return -(-rows // SLAB)


def pack_int4(q: Tensor) -> Tensor:
    """[N, K] int8 with values -8 … 7 -> [blocks, slabs, 2048] int16."""
    return _words(q, parts=4, bits=4, offset=8)


def pack_int8(q: Tensor) -> Tensor:
    """[N, K] int8 -> [blocks, slabs, 4096] int16."""
    return _words(q, parts=2, bits=8, offset=0)


def in_blocks(q: Tensor) -> Tensor:
    """[N, K] int8 -> [blocks, N, 128] int8."""
    rows, columns = q.shape
    return functional.pad(q, (0, -columns % BLOCK)).view(rows, -1, BLOCK).transpose(0, 1).contiguous()


def _words(q: Tensor, *, parts: int, bits: int, offset: int) -> Tensor:
    rows, columns = q.shape
    padded = functional.pad(q, (0, -columns % BLOCK, 0, -rows % SLAB))
    across = padded.view(padded.shape[0], -1, parts, BLOCK // parts).transpose(0, 1)
    words = torch.zeros(across.shape[0], across.shape[1], BLOCK // parts, dtype=torch.int16, device=q.device)
    for part in range(parts):
        words |= ((across[:, :, part].to(torch.int16) + offset) & ((1 << bits) - 1)) << (part * bits)
    split = words.view(words.shape[0], slabs(rows), *_ROW, -1, *_COLUMN)
    # [block, slab, warp, half, i, sixteen, half, j, odd] -> sixteen, warp, i, j | half of 16, half of rows, odd
    return split.permute(0, 1, 5, 2, 4, 7, 6, 3, 8).reshape(words.shape[0], slabs(rows), -1)


def unpack_int4(words: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack_int4`: [blocks, slabs, 2048] int16 -> [rows, columns] int8."""
    ordered = _in_rows(words)
    return _integers([((ordered >> (4 * part)) & 15) - 8 for part in range(4)], rows, columns)


def unpack_int8(words: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack_int8`: [blocks, slabs, 4096] int16 -> [rows, columns] int8."""
    ordered = _in_rows(words)
    return _integers([(ordered << 8) >> 8, ordered >> 8], rows, columns)


def _in_rows(words: Tensor) -> Tensor:
    """Words [blocks, slabs, words] in memory order -> [blocks, rows, words per row]."""
    split = words.view(*words.shape[:2], -1, 4, 8, 4, 2, 2, 2)
    return split.permute(0, 1, 3, 7, 4, 2, 6, 5, 8).reshape(words.shape[0], words.shape[1] * SLAB, -1)


def _integers(parts: list[Tensor], rows: int, columns: int) -> Tensor:
    stacked = torch.stack(parts, dim=2)  # [blocks, rows, parts, words per row]
    return stacked.transpose(0, 1).reshape(stacked.shape[1], -1)[:rows, :columns].to(torch.int8)
