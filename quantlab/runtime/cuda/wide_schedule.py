"""Schedules of products of many rows for the persistent programs of `hopper.wide_product`, one per multiprocessor.

Tiles are large, most numbers of tokens are no multiple of their size, and few tiles fill the multiprocessors badly. So
the tokens may be divided into chunks that suit the tiles, for example 640 into 512 and 128.

Tiles rarely fill whole waves of programs, and a wave takes long. So the last tiles are shared (stream-K). Where they
are too few for a wave, they are divided into halves, thirds, quarters or two thirds; or, alone or together with the
tiles of the previous wave, into as many equal ranges of blocks of columns as there are programs. Shared tiles cost
memory traffic and a wait. Ranges that do not begin and end with tiles also put programs out of step: at any time they
load different columns of the activations. The constants were measured on one H100 at the shapes of DeepSeek models
(`eval/results/cuda-linears-h100.md`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from operator import itemgetter
from typing import Final

from quantlab.runtime.cuda.layout import blocks
from quantlab.runtime.cuda.tiles import Chip, Kind

ROWS: Final = 128
"""Matrix rows of a tile."""

WIDE_TOKENS: Final = 96
"""From this many tokens on, the kernel is faster than `kernels.product` at all shapes."""
MAX_CHUNK_TOKENS: Final = 4096
"""Largest chunk: beyond, the L2 cache does not hold the data that the tiles of a wave share."""
_CHUNK_STEP: Final = 64
"""Chunks are multiples of this many tokens."""
_CHUNK_COST: Final = 2.5
"""Overhead of one more chunk, in microseconds."""

_BLOCK_COST: Final = {128: 0.82, 192: 1.08, 256: 1.35}
"""Time of a tile per block of columns, by its tokens, in microseconds."""
_SHARE_COST: Final = {128: 1.25, 192: 1.15, 256: 1.85}
"""Time per share of a shared tile, by its tokens, in microseconds."""
_WRITE_COST: Final = 2.5
"""Time to write a tile and begin the next, in microseconds."""
_OUT_OF_STEP: Final = {
    Kind.INT4: {128: 16 << 20, 192: 16 << 20, 256: 40 << 20},
    Kind.INT8: {128: 4 << 20, 192: 8 << 20, 256: 16 << 20},
}
"""Up to this many bytes of activations, programs may be out of step, since the L2 cache holds them."""
_NARROW: Final = {Kind.INT4: 16 << 20, Kind.INT8: 12 << 20}
"""Up to this many bytes of activations, tiles of 128 tokens, of low arithmetic intensity, are not memory-bound."""


@dataclass(frozen=True)
class Schedule:
    """A division of a product among programs.

    Attributes:
        tokens: tokens per tile: 128, 192 or 256.
        programs: number of programs.
        shared: how many tiles, the last ones, are divided into equal ranges; the others are computed whole, in waves.
        sharers: how many programs have a range.
    """

    tokens: int
    programs: int
    shared: int = 0
    sharers: int = 1


def token_chunks(kind: Kind, rows: int, columns: int, tokens: int, chip: Chip) -> list[tuple[int, Schedule]]:
    """The chunks of `tokens` rows for a product with one matrix [rows, columns]: tokens and schedule of each.

    They have the least total cost.
    """
    found = [
        (steps * _CHUNK_STEP, schedule)
        for steps, schedule in _token_chunks(kind, rows, columns, -(-tokens // _CHUNK_STEP), chip)
    ]
    last = tokens - sum(count for count, _ in found[:-1])
    return [*found[:-1], (last, found[-1][1])]


@lru_cache(maxsize=4096)
def _token_chunks(kind: Kind, rows: int, columns: int, steps: int, chip: Chip) -> tuple[tuple[int, Schedule], ...]:
    """The chunks of `steps` * _CHUNK_STEP tokens, each as number of steps and schedule, by dynamic programming."""
    sizes = range(_CHUNK_STEP, min(MAX_CHUNK_TOKENS, steps * _CHUNK_STEP) + 1, _CHUNK_STEP)
    singles = [best_schedule(kind, rows, columns, size, chip) for size in sizes]
    least = [(0.0, 0)]  # for each number of steps: least microseconds, steps of the last chunk
    for count in range(1, steps + 1):
        costs = [
            (least[count - last][0] + single[0] + _CHUNK_COST, last) for last, single in enumerate(singles[:count], 1)
        ]
        least.append(min(costs, key=itemgetter(0)))
    found: list[tuple[int, Schedule]] = []
    while steps:
        last = least[steps][1]
        found.append((last, singles[last - 1][1]))
        steps -= last
    return tuple(found)


@lru_cache(maxsize=4096)
def best_schedule(kind: Kind, rows: int, columns: int, tokens: int, chip: Chip) -> tuple[float, Schedule]:
    """The least cost of a product of one matrix [rows, columns] with `tokens` rows, and the schedule that has it.

    The cost is an estimate in microseconds for one H100.
    """
    sizes = (128, 192, 256) if tokens <= 128 or 2 * tokens * columns <= _NARROW[kind] else (192, 256)
    every = [schedule for size in sizes for schedule in candidates(kind, rows, columns, tokens, chip, size)]
    costs = [_cost(schedule, -(-rows // ROWS) * -(-tokens // schedule.tokens), blocks(columns)) for schedule in every]
    return min(zip(costs, every, strict=True), key=itemgetter(0))


def candidates(kind: Kind, rows: int, columns: int, tokens: int, chip: Chip, size: int) -> Iterator[Schedule]:
    """Schedules in tiles of `size` tokens that are worth considering."""
    count = -(-rows // ROWS) * -(-tokens // size)
    rounds, remainder = divmod(count, chip.multiprocessors)
    yield Schedule(size, min(count, chip.multiprocessors))
    out_of_step = 2 * tokens * columns <= _OUT_OF_STEP[kind][size]
    every = (chip.multiprocessors,) if out_of_step and not rounds else ()
    for sharers in sorted({3 * remainder // 2, 2 * remainder, 3 * remainder, 4 * remainder, *every}):
        if remainder < sharers <= min(chip.multiprocessors, remainder * blocks(columns)):
            yield Schedule(size, chip.multiprocessors if rounds else sharers, remainder, sharers)
    if rounds and remainder and out_of_step:
        shared = remainder + chip.multiprocessors
        three_of_four = shared // 4 * 3  # then three ranges cover exactly four tiles
        yield Schedule(size, chip.multiprocessors, shared, chip.multiprocessors)
        if shared % 4 == 0 and 0.9 * chip.multiprocessors < three_of_four <= chip.multiprocessors:
            yield Schedule(size, chip.multiprocessors, shared, three_of_four)


def _cost(schedule: Schedule, tiles: int, steps: int) -> float:
    """Estimated time of the longest program, in microseconds."""
    cost = -(-(tiles - schedule.shared) // schedule.programs) * (steps * _BLOCK_COST[schedule.tokens] + _WRITE_COST)
    if schedule.shared:
        run = -(-schedule.shared * steps // schedule.sharers)
        pattern = schedule.shared // gcd(
            schedule.shared, schedule.sharers
        )  # number of tiles after which a range begins with a tile again
        tiles_met = 1 if pattern == 1 else 2 if pattern <= 4 else 3
        cost += (
            run * _BLOCK_COST[schedule.tokens]
            + tiles_met * _WRITE_COST
            + max(-(-steps // run), 2) * _SHARE_COST[schedule.tokens]
        )
    return cost
