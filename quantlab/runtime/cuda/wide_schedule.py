"""How products of many rows are dealt out to the programs of `hopper.wide_product`, one per multiprocessor.

Tiles are larger than most numbers of tokens are round, and few tiles fill the multiprocessors well. So the tokens may be
multiplied in turns, for which tiles are right: 640 as 512 and 128, for example.

Tiles rarely fill whole rounds of programs, and a round is long. So the last tiles are cut: into halves, thirds, quarters or
two thirds where they are too few for a round, or, alone or together with the tiles of the round before, into as many equal
runs of blocks of columns as there are programs. Shares cost memory traffic and a wait; runs of unequal ends also have
programs walk the columns out of step, each asking for other activations than the rest. The numbers were measured on one H100
at the shapes of DeepSeek models (`eval/results/cuda-linears-h100.md`).
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
"""From this many tokens on the kernel is faster than `kernels.product` everywhere."""
MAX_CHUNK_TOKENS: Final = 4096
"""Of a turn, at most: the second-level cache would not keep what tiles of a round read together."""
_CHUNK_STEP: Final = 64
"""Turns have multiples of so many tokens."""
_CHUNK_COST: Final = 2.5
"""Microseconds that one more turn costs besides."""

_BLOCK_COST: Final = {128: 0.82, 192: 1.08, 256: 1.35}
"""Microseconds that a tile of so many tokens takes per block of columns, …"""
_SHARE_COST: Final = {128: 1.25, 192: 1.15, 256: 1.85}
"""… and per share, if its columns are shared."""
_WRITE_COST: Final = 2.5
"""Microseconds until a tile is written and the next begun."""
_OUT_OF_STEP: Final = {
    Kind.INT4: {128: 16 << 20, 192: 16 << 20, 256: 40 << 20},
    Kind.INT8: {128: 4 << 20, 192: 8 << 20, 256: 16 << 20},
}
"""Bytes of activations up to which programs may walk the columns out of step: the second-level cache keeps them."""
_NARROW: Final = {Kind.INT4: 16 << 20, Kind.INT8: 12 << 20}
"""Bytes of activations up to which tiles of 128 tokens, which read twice as much for their arithmetic, are not held up."""


@dataclass(frozen=True)
class Schedule:
    """A way to deal a product out.

    Attributes:
        tokens: of a tile, 128, 192 or 256.
        programs: how many there are.
        shared: how many tiles, the last, are cut into equal runs; the others are taken whole, in rounds.
        sharers: how many programs have a run.
    """

    tokens: int
    programs: int
    shared: int = 0
    sharers: int = 1


def token_chunks(kind: Kind, rows: int, columns: int, tokens: int, chip: Chip) -> list[tuple[int, Schedule]]:
    """Of how many tokens each turn is in a product of `tokens` with one matrix [rows, columns], and how it is dealt out.

    Their costs are least together.
    """
    found = [
        (steps * _CHUNK_STEP, schedule)
        for steps, schedule in _token_chunks(kind, rows, columns, -(-tokens // _CHUNK_STEP), chip)
    ]
    last = tokens - sum(count for count, _ in found[:-1])
    return [*found[:-1], (last, found[-1][1])]


@lru_cache(maxsize=4096)
def _token_chunks(kind: Kind, rows: int, columns: int, steps: int, chip: Chip) -> tuple[tuple[int, Schedule], ...]:
    """The turns of `steps` times _STEP tokens, in such steps."""
    sizes = range(_CHUNK_STEP, min(MAX_CHUNK_TOKENS, steps * _CHUNK_STEP) + 1, _CHUNK_STEP)
    singles = [best_schedule(kind, rows, columns, size, chip) for size in sizes]
    least = [(0.0, 0)]  # by steps: microseconds, and the last turn's
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
    """How the product of one matrix [rows, columns] with `tokens` rows is dealt out: the way that costs least, and its cost.

    The cost is in microseconds, on one H100.
    """
    sizes = (128, 192, 256) if tokens <= 128 or 2 * tokens * columns <= _NARROW[kind] else (192, 256)
    every = [schedule for size in sizes for schedule in candidates(kind, rows, columns, tokens, chip, size)]
    costs = [_cost(schedule, -(-rows // ROWS) * -(-tokens // schedule.tokens), blocks(columns)) for schedule in every]
    return min(zip(costs, every, strict=True), key=itemgetter(0))


def candidates(kind: Kind, rows: int, columns: int, tokens: int, chip: Chip, size: int) -> Iterator[Schedule]:
    """The ways to deal it out in tiles of `size` tokens that may be worth it."""
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
        three_of_four = shared // 4 * 3  # then three runs begin and end with four tiles
        yield Schedule(size, chip.multiprocessors, shared, chip.multiprocessors)
        if shared % 4 == 0 and 0.9 * chip.multiprocessors < three_of_four <= chip.multiprocessors:
            yield Schedule(size, chip.multiprocessors, shared, three_of_four)


def _cost(schedule: Schedule, tiles: int, steps: int) -> float:
    """Microseconds of the longest program."""
    cost = -(-(tiles - schedule.shared) // schedule.programs) * (steps * _BLOCK_COST[schedule.tokens] + _WRITE_COST)
    if schedule.shared:
        run = -(-schedule.shared * steps // schedule.sharers)
        pattern = schedule.shared // gcd(
            schedule.shared, schedule.sharers
        )  # tiles after which runs begin with a tile again
        tiles_met = 1 if pattern == 1 else 2 if pattern <= 4 else 3
        cost += (
            run * _BLOCK_COST[schedule.tokens]
            + tiles_met * _WRITE_COST
            + max(-(-steps // run), 2) * _SHARE_COST[schedule.tokens]
        )
    return cost
