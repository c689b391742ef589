"""Time of one linear on the CPU, in every number format and dtype of activations: torch's operators and the runtime's.

Sides of a format: *torch* is torch's packed operator, *runtime* what a loaded model calls, *bands* the expansion of bands
of the matrix to floating point with torch's matmul. *dense* is torch's matmul with a matrix of the activations' dtype,
the bound that the library gives; ratios are to it.

All sides are timed in turn within a round, so that other load on the machine affects them equally. Each call uses the
next matrix of a working set of at least twice the last-level cache. If that takes too much memory, the set is smaller
and its results are marked "cached". The rate is bytes of weights (scales included) per second; the title gives the rate
of reading memory. On a machine shared with other work, `--processor-time` times one thread by the processor time that it
gets.

    python tests/benchmarks/cpu_linears.py --rows 1 8
    python tests/benchmarks/cpu_linears.py --activations float32 --rows 16 128 512 --shapes 4096x4096 --processor-time
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from quantlab.hardware import processor
from quantlab.recipe.schemes import SCHEMES, SchemeName
from quantlab.runtime.banks.choice import quantized_matrices
from quantlab.runtime.banks.dense_product import band_dtype
from quantlab.runtime.banks.expanded import ExpandedMatrices
from quantlab.runtime.banks.groups import RowGroups
from quantlab.runtime.banks.int4_torch import TorchInt4Matrices
from quantlab.runtime.banks.int8 import Int8Matrices, Int8WeightMatrices, quantize_tokens
from quantlab.runtime.cuda.banks import CudaMatrices
from quantlab.runtime.device import free_bytes
from quantlab.runtime.modules.linear import dense_linear
from quantlab.runtime.native.library import status

SHAPES = ((22016, 2048), (2816, 2048), (2048, 1408), (2048, 11008), (7680, 2048))
CACHES = Path("/sys/devices/system/cpu")
LEAST_BYTES = 160_000_000
"""Smallest working set: bytes of weights per format."""
SIDES = 12
"""Working sets in memory at the same time: two or more for every format."""
SLOW = 2.0
"""Seconds."""
DENSE = "dense, torch"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEMES_TIMED: tuple[SchemeName, ...] = ("int8", "int8_weight", "int4_g128", "int4_g32")


def last_level_cache() -> int | None:
    """Total bytes of the last-level caches, each counted once even if several cores share it; None if unknown."""
    found: dict[int, dict[str, int]] = {}
    for index in CACHES.glob("cpu[0-9]*/cache/index[0-9]*"):
        level, shared = (int((index / "level").read_text()), (index / "shared_cpu_list").read_text().strip())
        if (index / "type").read_text().strip() != "Instruction":
            found.setdefault(level, {})[shared] = size_in_bytes((index / "size").read_text().strip())
    return sum(found[max(found)].values()) if found else None


def size_in_bytes(text: str) -> int:
    """Parse a size in the form of Linux, for example "32768K"."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


def working_set() -> tuple[int, bool]:
    """Bytes of weights per format, and whether they are at least twice the last-level cache (True if unknown)."""
    wanted = max(2 * (last_level_cache() or 0), LEAST_BYTES)
    free = free_bytes(torch.device("cpu"))
    most = wanted if free is None else max(free // 2 // SIDES, LEAST_BYTES)
    return min(wanted, most), wanted <= most


@dataclass(frozen=True)
class Side:
    """One implementation: its product with one of `count` matrices of `nbytes` each."""

    product: Callable[[Tensor, int], Tensor]
    count: int
    nbytes: int


def sides(shape: tuple[int, int], dtype: torch.dtype, held: int) -> dict[str, Side]:
    """For every format, the implementations of products with activations of `dtype`.

    Args:
        shape: N, K.
        dtype: of the activations.
        held: bytes of weights per format.
    """
    count = max(-(-held // (dtype.itemsize * shape[0] * shape[1])), 2)
    weights = torch.randn(shape).mul_(0.02).to(dtype).repeat(count, 1, 1)
    layers = [dense_linear(weight.clone(), None) for weight in weights]
    nbytes = weights.nbytes // count
    found = {
        DENSE: Side(lambda x, i: functional.linear(x, weights[i]), count, nbytes),
        "dense, runtime": Side(lambda x, i: layers[i](x), count, nbytes),
    }
    for scheme in SCHEMES_TIMED:
        found |= quantized(scheme, shape, dtype, held)
    return found


def quantized(scheme: SchemeName, shape: tuple[int, int], dtype: torch.dtype, held: int) -> dict[str, Side]:
    """The sides of a scheme, on random integers."""
    number = SCHEMES[scheme].format
    count = max(-(-held * 8 // (number.bits * shape[0] * shape[1])), 2)
    bank = quantized_matrices(number, count, *shape, scale_dtype=torch.bfloat16)
    randomize(bank)
    nbytes = sum(tensor.nbytes for tensor in bank.buffers()) // count

    def product(x: Tensor, index: int) -> Tensor:
        return bank.products(x, RowGroups((index,), (len(x),), torch.full((len(x),), index)))

    found = {f"{scheme}, runtime": Side(product, count, nbytes)}
    if isinstance(bank, Int8Matrices):
        found[f"{scheme}, torch"] = Side(lambda x, i: int8_by_torch(x, bank, i), count, nbytes)
        return found
    if not isinstance(bank, CudaMatrices | ExpandedMatrices):
        found[f"{scheme}, bands"] = Side(lambda x, i: bank._expanded_product(x.to(band_dtype(x)), i), count, nbytes)
    if dtype != torch.bfloat16:
        return found
    if isinstance(bank, Int8WeightMatrices):
        found[f"{scheme}, torch"] = Side(bank._packed_product, count, nbytes)
    elif TorchInt4Matrices.can_hold(number, shape, torch.bfloat16) is None:
        packed = TorchInt4Matrices(number, count, *shape, scale_dtype=torch.bfloat16)
        randomize(packed)
        nbytes = (packed.packed.nbytes + packed.scale.nbytes) // count
        found[f"{scheme}, torch"] = Side(packed._packed_product, count, nbytes)
    return found


def randomize(bank: torch.nn.Module) -> None:
    """Fill a bank with random integers and equal scales."""
    for tensor in bank.buffers():
        if tensor.is_floating_point():
            tensor.fill_(0.01)
        else:
            tensor.view(torch.uint8).random_(0, 256)


def int8_by_torch(x: Tensor, bank: Int8Matrices, index: int) -> Tensor:
    """W8A8 by torch's integer operator, which may be inexact."""
    integers, token_scale = quantize_tokens(x)
    return (torch._int_mm(integers, bank.q[index].t()) * token_scale).mul_(bank.scale[index]).to(x.dtype)


def read_rate(held: int, clock: Callable[[], float]) -> float:
    """GB/s of summing a tensor of `held` bytes."""
    tensor = torch.ones(held // 8, dtype=torch.int64)
    rates = []
    for _ in range(9):
        start = clock()
        tensor.sum()
        rates.append(tensor.nbytes / (clock() - start) / 1e9)
    return statistics.median(rates)


def timed(
    chosen: dict[str, Side], x: Tensor, *, rounds: int, clock: Callable[[], float]
) -> Iterator[tuple[str, float]]:
    """Median seconds of each implementation. One that takes over `SLOW` seconds is timed once."""
    turns = {name: itertools.cycle(range(side.count)) for name, side in chosen.items()}
    times: dict[str, list[float]] = {name: [] for name in chosen}
    for turn in range(rounds + 1):
        for name, side in chosen.items():
            if turn and times[name][0] > SLOW:
                continue
            index = next(turns[name])
            start = clock()
            side.product(x, index)
            times[name].append(clock() - start)
    for name, values in times.items():
        yield name, statistics.median(values[1:] or values)


def tables(
    arguments: argparse.Namespace, held: int, clock: Callable[[], float]
) -> Iterator[tuple[str, list[list[str]]]]:
    """For each dtype and number of rows a heading and the cells: header, then a line for each side."""
    for name in arguments.activations:
        dtype = DTYPES[name]
        cells: dict[int, list[dict[str, str]]] = {rows: [] for rows in arguments.rows}
        for shape in arguments.shapes:
            chosen = sides(shape, dtype, held)
            for rows in arguments.rows:
                x = torch.randn(rows, shape[1]).to(dtype)
                medians = dict(timed(chosen, x, rounds=arguments.rounds, clock=clock))
                cells[rows].append(
                    {
                        side: f"{1e6 * t:.0f} {medians[DENSE] / t:.2f}x ({chosen[side].nbytes / t / 1e9:.1f})"
                        for side, t in medians.items()
                    }
                )
            del chosen
        for rows, columns in cells.items():
            lines = [["", *(f"{n}x{k}" for n, k in arguments.shapes)]]
            names = dict.fromkeys(side for column in columns for side in column)
            lines += [[side, *(column.get(side, "–") for column in columns)] for side in names]
            yield f"{name} activations, {rows} row{'s' if rows > 1 else ''}", lines


def size(text: str) -> tuple[int, int]:
    """Parse N x K, for example "4096x2048"."""
    rows, columns = text.split("x")
    return int(rows), int(columns)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="rows of activations")
    parser.add_argument("--activations", nargs="+", choices=DTYPES, default=["bfloat16"], help="dtype of activations")
    parser.add_argument("--shapes", type=size, nargs="+", default=SHAPES, help="N x K of the matrices")
    parser.add_argument("--rounds", type=int, default=20, help="timed turns of each side")
    parser.add_argument("--processor-time", action="store_true", help="one thread, its processor time")
    parser.add_argument("--out", type=Path, help="also write a page of Markdown")
    arguments = parser.parse_args()
    if arguments.processor_time:
        torch.set_num_threads(1)
    clock = time.thread_time if arguments.processor_time else time.perf_counter
    held, from_memory = working_set()
    cache = last_level_cache()
    known = "of unknown size" if cache is None else f"of {cache / 1e6:.0f} MB"
    title = (
        f"µs, ratio to {DENSE}, (GB/s of weights); {torch.get_num_threads()} threads, {status()}, "
        f"{held / 1e6:.0f} MB of weights per format{'' if from_memory else ' (cached)'}, last-level cache {known}, "
        f"memory read at {read_rate(held, clock):.0f} GB/s, {'processor' if arguments.processor_time else 'wall'} time, "
        f"median of {arguments.rounds} rounds"
    )
    page = [
        "# Linears on the CPU",
        f"Written by `tests/benchmarks/cpu_linears.py`; {processor()}, torch {torch.__version__}. Cells are {title}.",
    ]
    Console(width=150).print(title)
    for heading, lines in tables(arguments, held, clock):
        table = Table(title=heading)
        for index, column in enumerate(lines[0]):
            table.add_column(column, justify="right" if index else "left")
        for line in lines[1:]:
            table.add_row(*line)
        Console(width=150).print(table)
        rows = [f"| {' | '.join(line)} |" for line in lines]
        page.append("\n".join([f"## {heading}\n", rows[0], "|---" * len(lines[0]) + "|", *rows[1:]]))
        if arguments.out is not None:
            arguments.out.write_text("\n\n".join(page) + "\n")


if __name__ == "__main__":
    main()
