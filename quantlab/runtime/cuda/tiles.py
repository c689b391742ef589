"""Tile sizes of a product by shape and number of tokens: a fixed choice, since a captured step cannot autotune.

The constants were measured on one H100 at the shapes of DeepSeek models (`eval/results/cuda-linears-h100.md`). At few
tokens a product is memory-bound, and all that matters is that enough loads are in flight: the columns are split
(split-K) until there are a few programs per multiprocessor. At many tokens it is compute-bound and tiles are large; the
choice minimizes the estimated time of all waves of tiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final

from quantlab.runtime.cuda.layout import SLAB, blocks


class Kind(IntEnum):
    """The kind of numbers in a bank: a constexpr argument of the kernels."""

    INT4 = 0
    INT8 = 1
    INT8_TOKENS = 2
    FLOAT = 3


@dataclass(frozen=True)
class Tiles:
    """The division of a product into tiles of `rows` matrix rows times `tokens` tokens.

    Attributes:
        parts: into how many parts the columns are split (`kernels.product`), or programs per multiprocessor
            (`kernels.run_product`).
        warps: per program: 1, 4 or 8.
        stages: stages of the software pipeline of loads.
        ahead: for INT8_TOKENS, how many blocks of columns are prefetched while the tokens are being quantized.
        runs: whether the work is divided into equal ranges (stream-K, `kernels.run_product`) instead of tiles.
        pairs: for INT8_TOKENS, whether an iteration takes two blocks of columns instead of one.
    """

    rows: int
    tokens: int
    parts: int = 1
    warps: int = 4
    stages: int = 3
    ahead: int = 0
    runs: bool = False
    pairs: bool = False


@dataclass(frozen=True)
class Chip:
    """The properties of a GPU that the choice depends on.

    Attributes:
        multiprocessors: their number.
        shared_bytes: maximum shared memory of a program.
        overlaps: whether it supports programmatic dependent launch (compute capability 9 and later).
        wide: whether it runs `hopper.wide_product`.
    """

    multiprocessors: int
    shared_bytes: int
    overlaps: bool
    wide: bool = False


FEW_TOKENS: Final = 64
"""Up to this many tokens a product is memory-bound."""
EXPANDED_TOKENS: Final = 1536
"""From this many tokens on, expanding a matrix in bands for a library's product is faster than `kernels.product`."""
_BAND_ELEMENTS: Final = 1 << 25

_WIDE: Final = {Kind.INT4: Tiles(128, 256, warps=8), Kind.INT8: Tiles(256, 128, warps=8)}
_SQUARE: Final = Tiles(128, 128, warps=8)
_NARROW: Final = Tiles(64, 128)
_MICROSECONDS: Final = {_WIDE[Kind.INT4]: 1.75, _WIDE[Kind.INT8]: 1.9, _SQUARE: 1.05, _NARROW: 0.75}
"""Time of a tile per block of columns."""


def band_rows(columns: int) -> int:
    """How many rows of a matrix are expanded at once: enough to fill waves of tiles, in 64 MB at most."""
    return max((rows for rows in (8192, 4096, 2048) if rows * columns <= _BAND_ELEMENTS), default=2048)


def linear_tiles(kind: Kind, rows: int, columns: int, tokens: int, chip: Chip, *, gated: bool = False) -> Tiles:
    """The tiles of one matrix [rows, columns] times `tokens` rows; `gated` (few tokens only): see `kernels.product`."""
    if tokens > FEW_TOKENS:
        found = (
            _integer_tiles(rows, columns, tokens, chip)
            if kind == Kind.INT8_TOKENS
            else _large(kind, rows, columns, tokens, chip)
        )
    elif kind == Kind.INT8_TOKENS:
        found = _few_integers(rows, columns, tokens, chip, gated=gated)
    elif kind != Kind.INT4:
        stages = 3 if tokens > 32 and -(-rows // 64) > 1.5 * chip.multiprocessors else 4
        parts = _parts(rows, columns, 64, programs=1.7 * chip.multiprocessors, least=4)
        found = Tiles(64, _power(tokens), parts, stages=stages)
    elif tokens <= 8:
        found = Tiles(128, 8, _parts(rows, columns, 128, programs=4 * chip.multiprocessors, least=3))
    elif tokens <= 16:
        found = Tiles(64, 16, _parts(rows, columns, 64, programs=6 * chip.multiprocessors, least=3))
    elif tokens <= 32:
        found = Tiles(64, 32, _parts(rows, columns, 64, programs=3.6 * chip.multiprocessors, least=8), stages=4)
    else:
        parts = _parts(rows, columns, 64, programs=3.6 * chip.multiprocessors, least=12)
        found = Tiles(64, 64, 3 if parts == 2 else parts)
    return fitting(_gated(found) if gated else found, kind, chip)


def expert_tiles(kinds: Sequence[Kind], rows_per_expert: float, chip: Chip) -> list[Tiles]:
    """The tiles of the products of routed rows with banks of these kinds, given the average number of rows per expert.

    All have the same number of tokens, since they share the blocks of rows.
    """
    tokens = next((size for size in (8, 16, 32, 64) if rows_per_expert <= 0.75 * size), 128)
    if Kind.FLOAT in kinds:
        tokens = max(tokens, 16)
    warps = 8 if tokens == 128 else 4
    parts = [3 if kind == Kind.INT4 and tokens == 8 else 2 for kind in kinds]
    cuts = [fitting(Tiles(128, tokens, n, warps, runs=True), kind, chip) for n, kind in zip(parts, kinds, strict=True)]
    return [replace(cut, tokens=min(cut.tokens for cut in cuts)) for cut in cuts]


def fitting(tiles: Tiles, kind: Kind, chip: Chip) -> Tiles:
    """Shrink tiles to fit shared memory: fewer stages, then one block of columns per iteration, then fewer tokens."""
    weight = {Kind.INT4: 64, Kind.INT8: 128, Kind.INT8_TOKENS: 128, Kind.FLOAT: 256}[kind]
    activation = 128 if kind == Kind.INT8_TOKENS else 256
    stage = (tiles.rows * weight + tiles.tokens * activation) * (2 if tiles.pairs else 1)
    room = (chip.shared_bytes - 4096) // stage
    if tiles.pairs and room < 3:
        return fitting(replace(tiles, pairs=False), kind, chip)
    if room >= 2 or tiles.tokens == 8:
        return replace(tiles, stages=max(min(tiles.stages, room), 1))
    return fitting(replace(tiles, tokens=tiles.tokens // 2), kind, chip)


def _gated(tiles: Tiles) -> Tiles:
    """The tiles for a gated product, which hold as many gate rows as up rows.

    Tiles of one slab grow to two, one of each. With more than 16 tokens the larger tiles need half the parts.
    """
    if tiles.rows != SLAB:
        return tiles
    parts = tiles.parts if tiles.tokens <= 16 else max(tiles.parts // 2, 1)
    return replace(tiles, rows=2 * SLAB, parts=parts, ahead=tiles.ahead // 2)


def _few_integers(rows: int, columns: int, tokens: int, chip: Chip, *, gated: bool) -> Tiles:
    """The tiles of INT8_TOKENS at few tokens.

    Columns are split only where there are too few tiles, since the next kernel waits while partial sums are reduced.
    The fewer tiles per multiprocessor, the more stages each has. Tiles of 16 rows, one warp each, are as fast at few
    tokens and fill the GPU where tiles of 64 would not; but every tile loads all tokens, so at more tokens tiles have
    64 rows. From 33 tokens (17 if gated), where these would leave half of the GPU idle, two tiles have half of the
    tokens each.
    """
    size, steps, high, low = _power(tokens), blocks(columns), -(-rows // SLAB), -(-rows // 16)
    room = chip.shared_bytes // -(-high // chip.multiprocessors) // ((SLAB + size) * 128)
    stages = min(max(round(6.5 * chip.multiprocessors / high), 3), 8, max(room, 3))
    if size <= (8 if high > (1 if gated else 0.22) * chip.multiprocessors else 16):
        fills = high > 0.45 * chip.multiprocessors
        parts = 1 if fills else max(min(round(3.9 * chip.multiprocessors / low), steps // 14), 1)
        return Tiles(16, size, parts, warps=1, stages=stages, ahead=stages // 2)
    count = 2 * (-(-high // 2) if gated else high)
    if size >= (32 if gated else 64) and count <= chip.multiprocessors:
        parts = max(min(chip.multiprocessors // count, steps // 14), 1)
        if gated:
            return Tiles(2 * SLAB, size // 2, parts, stages=4 if size == 64 else 5, ahead=2, pairs=True)
        return Tiles(SLAB, size // 2, parts, stages=6, ahead=4, pairs=True)
    parts = max(min(round(0.55 * chip.multiprocessors / high), steps // 14), 1)
    return Tiles(SLAB, size, parts, stages=stages, ahead=stages // 2)


def _integer_tiles(rows: int, columns: int, tokens: int, chip: Chip) -> Tiles:
    tiles = -(-rows // 128) * -(-tokens // 128)
    return replace(_SQUARE, parts=2 if 2 * tiles <= chip.multiprocessors and blocks(columns) > 1 else 1)


def _large(kind: Kind, rows: int, columns: int, tokens: int, chip: Chip) -> Tiles:
    """The tiles with the least estimated time; where waves would not fill the GPU, these are stream-K or split-K."""
    steps = blocks(columns)

    def cost(tiles: Tiles) -> float:
        count = -(-rows // tiles.rows) * -(-tokens // tiles.tokens) * tiles.parts
        if tiles.runs:
            return count * steps / chip.multiprocessors * _MICROSECONDS[_SQUARE] + 20
        shared = (
            8e-6 / 3 * tiles.parts * tokens * rows if tiles.parts > 1 else 0.0
        )  # partial sums written and read at 3 TB/s
        each = _MICROSECONDS[replace(tiles, parts=1)] * steps / tiles.parts
        return -(-count // chip.multiprocessors) * each + shared

    cuts = [_SQUARE, replace(_SQUARE, runs=True), _NARROW]
    cuts += [_WIDE[kind]] if tokens > _WIDE[kind].tokens // 2 else []
    cuts += [replace(cut, parts=2) for cut in (_SQUARE, _NARROW)] if steps > 1 else []
    return min(cuts, key=cost)


def _parts(rows: int, columns: int, tile: int, *, programs: float, least: int) -> int:
    """Into how many parts to split the columns for about `programs` programs, each with at least `least` blocks.

    Among nearby numbers, one that divides the blocks evenly is preferred.
    """
    steps = blocks(columns)
    parts = max(min(round(programs / -(-rows // tile)), steps // least), 1)
    if parts < 5:
        return parts
    return next((near for near in (parts, parts + 1, parts - 1, parts - 2) if steps % near == 0), parts)


def _power(number: int) -> int:
    """The smallest power of two that is at least `number`, and at least 8."""
    return max(1 << (number - 1).bit_length(), 8)
