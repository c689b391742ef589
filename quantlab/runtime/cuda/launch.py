"""Launchers of the kernels: functions that take and return tensors."""

from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
import triton
from torch import Tensor

from quantlab.runtime.cuda import expand, kernels, rowwise, sort_by_expert
from quantlab.runtime.cuda.guard import hash_in_order, on_its_device
from quantlab.runtime.cuda.layout import blocks
from quantlab.runtime.cuda.tiles import FEW_TOKENS, Chip, Kind, Tiles
from quantlab.runtime.cuda.wide_schedule import ROWS, Schedule

hash_in_order(expand, kernels, rowwise, sort_by_expert)

GLUON: Final = "3.6."
"""Prefix of the triton versions that `hopper` supports: Gluon is experimental and changes between releases."""


@dataclass(frozen=True)
class Matrices:
    """E matrices [N, K] on the device, as the kernels read them.

    Attributes:
        kind: the kind of the stored numbers.
        shape: E, N, K.
        group: columns per scale of INT4.
        weight, scale: see `kernels.product` and `kernels.run_product`.
        arrived: [n] int32 counters, all zero, one for each tile of a split linear or for each program. Products of the
            same matrices must not run concurrently.
    """

    kind: Kind
    shape: tuple[int, int, int]
    group: int
    weight: Tensor
    scale: Tensor
    arrived: Tensor


@dataclass(frozen=True)
class Routing:
    """Rows sorted by expert, as `sort_by_expert.route` writes them, for blocks of `tokens` rows.

    If `alone`, all rows belong to one token: each is a block of its own, and `block_expert` is the index itself.
    """

    order: Tensor
    block_expert: Tensor
    block_first: Tensor
    block_end: Tensor
    block_count: Tensor
    tokens: int
    top_k: int
    alone: bool = False


@on_its_device
def route(index: Tensor, experts: int, tokens: int) -> Routing:
    """Sort the rows of index [T, k] by expert, in blocks of `tokens` rows; those of a single token are not sorted."""
    rows, index = index.numel(), index.contiguous()
    if index.shape[0] == 1:
        flat = index.view(-1)
        return Routing(flat, flat, flat, flat, flat, tokens, rows, alone=True)
    count = rows if rows <= experts else experts + (rows - experts) // tokens
    sizes = (rows, count, count, count, 1)
    written = [torch.empty(size, dtype=torch.int32, device=index.device) for size in sizes]
    chunk = min(max(power(rows), 16), 1024)
    bins = max(power(experts), 16)
    sort_by_expert.route[(experts,)](
        index, *written, rows,
        BINS=bins, CHUNK=chunk, BM=tokens, num_warps=4 if chunk > 128 else 1, **chained(index),
    )  # fmt: skip
    order, block_expert, block_first, block_end, block_count = written
    return Routing(order, block_expert, block_first, block_end, block_count, tokens, index.shape[1])


@on_its_device
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm of x [T, K] with weight [K] of the same dtype: [T, K]; see `rowwise.rms_norm`."""
    rows, columns = x.shape
    out = torch.empty_like(x)
    width = power(columns)
    rowwise.rms_norm[(rows,)](
        x, weight, out, columns, epsilon, WIDTH=width, num_warps=min(max(width // 512, 1), 16), **chained(x)
    )
    return out


@on_its_device
def combine(rows: Tensor, weights: Tensor, added: Tensor | None = None) -> Tensor:
    """Weighted sums [T, H] of rows [T * k, H] with weights [T, k], plus `added` [T, H]; see `rowwise.combine`."""
    tokens, top_k = weights.shape
    out = rows.new_empty(tokens, rows.shape[1])
    width = 512
    grid = (tokens, -(-rows.shape[1] // width))
    rowwise.combine[grid](
        rows, weights.contiguous(), rows if added is None else added, out, rows.shape[1],
        TOP_K=top_k, BH=width, ADDED=added is not None, num_warps=2, **chained(weights),
    )  # fmt: skip
    return out


@on_its_device
def quantize_tokens(x: Tensor, *, early: bool = False) -> tuple[Tensor, Tensor]:
    """Integers [T, K] int8 and scales [T] float32 of x [T, K], of any floating dtype; see `rowwise.quantize_tokens`."""
    rows, columns = x.shape
    q = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    width = power(columns)
    rowwise.quantize_tokens[(rows,)](
        x, q, scale, columns, WIDTH=width, EARLY=early, num_warps=min(max(width // 512, 1), 16), **chained(x)
    )
    return q, scale


@on_its_device
def product(
    m: Matrices,
    x: Tensor,
    x_scale: Tensor | None,
    tiles: Tiles,
    *,
    dtype: torch.dtype,
    gated: bool = False,
    added: Tensor | None = None,
) -> Tensor:
    """Multiply all rows of x by the only matrix of m.

    Args:
        m: the matrix.
        x: [T, K]; int8 where m is INT8_TOKENS.
        x_scale: [T], scales of int8 x.
        tiles: tile sizes and split of the product.
        dtype: of the result.
        gated: see `kernels.product`.
        added: tensor of the result's shape and dtype that is added to the product.

    Returns:
        [T, N], or [T, N / 2] if gated.
    """
    _, rows, columns = m.shape
    out = torch.empty(x.shape[0], rows // 2 if gated else rows, dtype=dtype, device=x.device)
    if not x.shape[0]:
        return out
    count = -(-x.shape[0] // tiles.tokens) * -(-rows // tiles.rows)
    partial, arrived = out, m.arrived
    if tiles.parts > 1:
        assert count <= arrived.shape[0], "one counter per tile"
        partial = _scratch(m, count * tiles.parts, tiles)
    kernels.product[(count, tiles.parts)](
        x, arrived if x_scale is None else x_scale, m.weight, m.scale, out if added is None else added, out, partial, arrived,
        x.shape[0], rows, columns, tiles.parts,
        KIND=int(m.kind), GROUP=m.group, GATED=gated, ADDED=added is not None, SPLIT=tiles.parts > 1,
        EVEN=columns % 128 == 0, BN=tiles.rows, BM=tiles.tokens, STAGES=tiles.stages, WARPS=tiles.warps, AHEAD=tiles.ahead,
        PAIRS=tiles.pairs, num_warps=tiles.warps, num_stages=tiles.stages, **chained(x),
    )  # fmt: skip
    return out


@on_its_device
def run_product(
    m: Matrices,
    x: Tensor,
    x_scale: Tensor | None,
    tiles: Tiles,
    *,
    dtype: torch.dtype,
    routed: Routing | None = None,
    gated: bool = False,
) -> Tensor:
    """Multiply all rows of x by the only matrix of m, or routed rows by the matrices of their experts.

    Args:
        m: the matrices.
        x: rows; int8 where m is INT8_TOKENS.
        x_scale: scales of int8 x.
        tiles: tile sizes of the product.
        dtype: of the result.
        routed: the matrix of each row, in blocks of `tiles.tokens` rows; None for a single matrix.
        gated: see `kernels.product`. With routing, a gated product is the first of the experts' two: sorted row p is
            row ``order[p] // k`` of x [T, K]. Otherwise it is the second: sorted row p of x [T * k, K] is written to
            row ``order[p]``.

    Returns:
        [·, N], or [·, N / 2] if gated, with a row for each row of x or each routed row; sorted by expert if gated and
        routed.
    """
    _, rows, columns = m.shape
    count = x.shape[0] if routed is None else routed.order.shape[0]
    out = torch.empty(count, rows // 2 if gated else rows, dtype=dtype, device=x.device)
    if not count:
        return out
    programs = tiles.parts * chip(x.device).multiprocessors
    assert programs <= m.arrived.shape[0], "one counter per program"
    none = m.arrived
    tables = (
        (routed.order, routed.block_expert, routed.block_first, routed.block_end, routed.block_count)
        if routed
        else (none,) * 5
    )
    kernels.run_product[(programs,)](
        x, none if x_scale is None else x_scale, m.weight, m.scale, out, _scratch(m, 2 * programs, tiles), m.arrived,
        *tables, count, rows, columns,
        KIND=int(m.kind), GROUP=m.group, GATED=gated, TOP_K=routed.top_k if routed and gated else 0,
        ROUTED=routed is not None, ALONE=routed is not None and routed.alone, EVEN=columns % 128 == 0,
        BN=tiles.rows, BM=tiles.tokens, STAGES=tiles.stages, WARPS=tiles.warps,
        num_warps=tiles.warps, num_stages=tiles.stages, **chained(x),
    )  # fmt: skip
    return out


@on_its_device
def wide_product(m: Matrices, x: Tensor, schedule: Schedule, out: Tensor) -> Tensor:
    """Multiply the rows of x [T, K], T > 0, by the only matrix of m, into out [T, N] of x's dtype; returns out.

    All rows must be aligned to 16 bytes, as TMA requires.
    """
    from quantlab.runtime.cuda import hopper

    _, rows, columns = m.shape
    shares = torch.empty(schedule.sharers * schedule.tokens * ROWS // 32, 32, dtype=torch.float32, device=x.device)
    assert schedule.sharers <= min(m.arrived.shape[0], schedule.programs), "one counter per program that shares"
    assert not schedule.shared or schedule.sharers <= schedule.shared * blocks(columns), (
        "programs wait for the shares of all ranges"
    )
    hopper.wide_product[(schedule.programs,)](
        *hopper.descriptors(x, schedule.tokens, 64), m.weight.view(torch.int32), m.scale, *hopper.descriptors(out, schedule.tokens, ROWS),
        shares, *hopper.descriptors(shares, schedule.tokens, 32), m.arrived,
        x.shape[0], rows, columns, schedule.shared, schedule.sharers,
        INT4=m.kind == Kind.INT4, GROUP=m.group, BM=schedule.tokens, num_warps=8, launch_pdl=True,
    )  # fmt: skip
    return out


def _scratch(m: Matrices, slots: int, tiles: Tiles) -> Tensor:
    """Scratch memory for the sums of `slots` tiles."""
    dtype = torch.int32 if m.kind == Kind.INT8_TOKENS else torch.float32
    return torch.empty(slots, tiles.tokens, tiles.rows, dtype=dtype, device=m.weight.device)


@on_its_device
def expanded(m: Matrices, index: int, first: int, count: int, out: Tensor) -> Tensor:
    """Dequantize rows `first` (a multiple of 64) to ``first + count`` of matrix `index` into out [count, K]."""
    _, rows, columns = m.shape
    expand.expand[(-(-count // 64), blocks(columns))](
        m.weight[index], m.scale[index], out, first, count, rows, columns,
        INT4=m.kind == Kind.INT4, GROUP=m.group, BN=64, num_warps=4,
    )  # fmt: skip
    return out


@cache
def chip(device: torch.device) -> Chip:
    """The properties of a GPU that tile sizes depend on; invented ones for the CPU, where triton's interpreter runs."""
    if device.type != "cuda":
        return Chip(3, 232448, overlaps=False)
    properties = torch.cuda.get_device_properties(device)
    shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    wide = properties.major == 9 and triton.__version__.startswith(GLUON)
    return Chip(properties.multi_processor_count, shared, overlaps=properties.major >= 9, wide=wide)


def chained(x: Tensor) -> dict[str, bool]:
    """Launch options: programmatic dependent launch for few rows x [T, ·], if the GPU supports it; see `kernels`."""
    overlaps = chip(x.device).overlaps and x.shape[0] <= FEW_TOKENS
    return {"CHAINED": overlaps, "launch_pdl": overlaps}


def power(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()
