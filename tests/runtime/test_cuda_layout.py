"""Memory layout of packed integers on a CUDA device, and tile sizes of products; no GPU is needed."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations, pairwise, product

import pytest
import torch

from quantlab.runtime.cuda import layout
from quantlab.runtime.cuda.tiles import Chip, Kind, Tiles, band_rows, expert_tiles, fitting, linear_tiles
from quantlab.runtime.cuda.wide_schedule import (
    _CHUNK_COST,
    MAX_CHUNK_TOKENS,
    ROWS,
    Schedule,
    best_schedule,
    candidates,
    token_chunks,
)

H100 = Chip(132, 232448, overlaps=True, wide=True)
SMALL = Chip(46, 101376, overlaps=False)
LEAST = Chip(40, 65536, overlaps=False)


@pytest.mark.parametrize("shape", [(64, 128), (128, 256), (80, 96), (1, 384), (130, 1408)])
def test_packing_is_undone_by_unpacking(shape: tuple[int, int]) -> None:
    q4 = torch.randint(-8, 8, shape, dtype=torch.int8)
    q8 = torch.randint(-128, 128, shape, dtype=torch.int8)
    assert torch.equal(layout.unpack_int4(layout.pack_int4(q4), *shape), q4)
    assert torch.equal(layout.unpack_int8(layout.pack_int8(q8), *shape), q8)


def test_a_thread_finds_its_weights_in_sixteen_bytes() -> None:
    """Every thread's eight words, in register order, against PTX's fragment layout of the left operand of m64n_k16."""
    q = torch.randint(-8, 8, (64, 128), dtype=torch.int8)
    words = layout.pack_int4(q)[0, 0].to(torch.int32) & 0xFFFF
    for half in range(2):  # halves of the 32 columns of a quarter
        for thread in range(128):
            warp, i, j = thread // 32, thread % 32 // 4, thread % 4
            found = words[half * 1024 + thread * 8 :][:8].tolist()
            places = [
                (16 * warp + i + 8 * lower, 16 * half + 2 * j + 8 * right + odd)
                for right in range(2)
                for lower in range(2)
                for odd in range(2)
            ]
            for word, (row, column) in zip(found, places, strict=True):
                assert [(word >> 4 * part & 15) - 8 for part in range(4)] == q[row, column::32].tolist()


def test_rows_for_integer_products_lie_in_blocks() -> None:
    q = torch.randint(-128, 128, (3, 200), dtype=torch.int8)
    blocks = layout.in_blocks(q)
    assert blocks.shape == (2, 3, 128)
    assert torch.equal(blocks.transpose(0, 1).reshape(3, 256)[:, :200], q)
    assert not blocks[1, :, 72:].any()


@pytest.mark.parametrize("chip", [H100, SMALL, LEAST])
@pytest.mark.parametrize("kind", [Kind.INT4, Kind.INT8, Kind.INT8_TOKENS])
def test_every_cut_fits_the_chip(kind: Kind, chip: Chip) -> None:
    width = {Kind.INT4: 64, Kind.INT8: 128, Kind.INT8_TOKENS: 128}[kind]
    activation = 128 if kind == Kind.INT8_TOKENS else 256
    for rows, columns in ((18432, 7168), (7168, 18432), (24576, 1536), (4096, 7168), (576, 2048), (1, 128)):
        for tokens in (1, 8, 9, 16, 17, 40, 64, 65, 128, 129, 512, 1500):
            for gated in (False, True) if tokens <= 64 else (False,):
                tiles = linear_tiles(kind, rows, columns, tokens, chip, gated=gated)
                stage = (tiles.rows * width + tiles.tokens * activation) * (2 if tiles.pairs else 1)
                assert tiles.stages * stage <= chip.shared_bytes
                assert tiles.tokens == 8 or tiles.tokens < 2 * tokens
                assert 1 <= tiles.parts <= -(-columns // 128)
                assert not gated or tiles.rows in {16, 128}, "half of the rows are gate rows, half are up rows"
                count = -(-rows // tiles.rows) * -(-tokens // tiles.tokens)
                assert tiles.parts == 1 or tiles.runs or count <= 4096, "no more than the counters of a bank"
                assert not tiles.pairs or count * tiles.parts <= chip.multiprocessors, "not more than one wave"


def test_experts_share_one_size_of_block() -> None:
    for chip in (H100, SMALL):
        for rows in (0.03, 0.5, 8, 24, 100, 4000):
            for kinds in ([Kind.INT4, Kind.INT4], [Kind.FLOAT, Kind.FLOAT], [Kind.INT8_TOKENS, Kind.INT4]):
                first, second = expert_tiles(kinds, rows, chip)
                assert first.tokens == second.tokens
                assert first.runs
                assert second.runs


def test_tiles_shrink_to_what_memory_holds() -> None:
    assert fitting(Tiles(128, 256, warps=8), Kind.INT4, H100).tokens == 256
    shrunk = fitting(Tiles(128, 256, warps=8), Kind.INT4, SMALL)
    assert shrunk.tokens < 256
    assert shrunk.stages >= 2


def test_bands_stay_small() -> None:
    for columns in (512, 1536, 4096, 7168, 18432):
        assert band_rows(columns) % 64 == 0
        assert band_rows(columns) * columns <= 1 << 26


@pytest.mark.parametrize("multiprocessors", [3, 114, 132])
@pytest.mark.parametrize("kind", [Kind.INT4, Kind.INT8])
def test_every_tile_is_dealt_out_once(kind: Kind, multiprocessors: int) -> None:
    """Simulates `hopper_stream_k.program_work`, `item_range` and `range_owning` for every range of every schedule."""
    chip = replace(H100, multiprocessors=multiprocessors)
    shapes = ((18432, 7168), (7168, 18432), (24576, 1536), (4096, 7168), (11008, 4096), (576, 2048), (8, 128))
    for (rows, columns), tokens in product(shapes, (65, 128, 129, 300, 512, 1100, 2048, 2049, 8192)):
        every = [
            schedule for size in (128, 192, 256) for schedule in candidates(kind, rows, columns, tokens, chip, size)
        ]
        assert best_schedule(kind, rows, columns, tokens, chip)[1] in every
        for schedule in every:
            tiles, blocks = -(-rows // ROWS) * -(-tokens // schedule.tokens), -(-columns // 128)
            units = schedule.shared * blocks
            runs = [
                (run * units // schedule.sharers, (run + 1) * units // schedule.sharers)
                for run in range(schedule.sharers)
            ]
            assert 1 <= schedule.sharers <= schedule.programs <= multiprocessors
            assert 0 <= schedule.shared <= tiles
            assert schedule.shared == tiles or schedule.programs == min(multiprocessors, tiles)
            assert all(first < last for first, last in runs) or not schedule.shared, (
                "the program that adds the shares waits for all ranges"
            )
            left: list[int] = []
            for unit in range(0, units, blocks):
                owner, last_owner = (((end + 1) * schedule.sharers - 1) // units for end in (unit, unit + blocks - 1))
                assert runs[owner][0] <= unit < runs[owner][1], "this program adds the shares"
                assert runs[last_owner][0] < unit + blocks <= runs[last_owner][1]
                left += range(owner + 1, last_owner + 1)
            assert len(left) == len(set(left)), "a range writes at most one share: there is room for one of each"
            assert left == [run for run, (first, _) in enumerate(runs) if schedule.shared and first % blocks]


def test_tiles_that_fill_no_round_are_shared() -> None:
    def chosen(rows: int, columns: int, tokens: int) -> Schedule:
        return best_schedule(Kind.INT4, rows, columns, tokens, H100)[1]

    assert chosen(18432, 7168, 1024).tokens == 256
    assert chosen(24576, 1536, 512).shared == 0
    assert (chosen(4096, 7168, 512).shared, chosen(4096, 7168, 512).sharers) == (64, 128)
    assert chosen(7168, 18432, 2048).shared < 132, (
        "75 MB of activations do not fit the L2 cache, so programs stay in step"
    )


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 300, 640, 1024, 1025, 5000])
def test_turns_take_every_token_once(tokens: int) -> None:
    for kind, (rows, columns) in product((Kind.INT4, Kind.INT8), ((18432, 7168), (4096, 7168), (8, 128))):
        each = token_chunks(kind, rows, columns, tokens, H100)
        assert sum(count for count, _ in each) == tokens
        assert all(1 <= count <= MAX_CHUNK_TOKENS for count, _ in each)
        for count, schedule in each:
            assert schedule in candidates(kind, rows, columns, -(-count // 64) * 64, H100, schedule.tokens)


@pytest.mark.parametrize("tokens", [64, 320, 448, 640])
@pytest.mark.parametrize("kind", [Kind.INT4, Kind.INT8])
def test_no_other_turns_cost_less(kind: Kind, tokens: int) -> None:
    """Against all divisions of the tokens into multiples of 64."""
    for matrix in ((18432, 7168), (7168, 18432), (24576, 1536), (4096, 7168), (7168, 2048)):

        def cost(counts: Iterable[int], matrix: tuple[int, int] = matrix) -> float:
            return sum(best_schedule(kind, *matrix, count, H100)[0] + _CHUNK_COST for count in counts)

        cuts = (cut for count in range(tokens // 64) for cut in combinations(range(64, tokens, 64), count))
        least = min(cost(last - first for first, last in pairwise((0, *cut, tokens))) for cut in cuts)
        assert cost(count for count, _ in token_chunks(kind, *matrix, tokens, H100)) == pytest.approx(least)


def test_tokens_that_fill_no_tiles_are_multiplied_in_turns() -> None:
    assert len(token_chunks(Kind.INT4, 18432, 7168, 640, H100)) == 2
    assert len(token_chunks(Kind.INT4, 18432, 7168, 512, H100)) == 1
