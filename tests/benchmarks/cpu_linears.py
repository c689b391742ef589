"""Time of one linear with few rows on the CPU, in every number format: torch's operators and the native kernels.

All formats are timed in turn within a round, so that other load on the machine affects them equally. Each call uses the
next matrix of a working set of at least twice the last-level cache. If that takes too much memory, the set is smaller
and its results are marked "cached". The rate is bytes of weights (scales included) per second; the title gives the rate
of reading memory.

    python tests/benchmarks/cpu_linears.py --rows 1 8
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

from quantlab.recipe.schemes import SCHEMES, SchemeName
from quantlab.runtime.banks.choice import quantized_matrices
from quantlab.runtime.banks.dense import DenseMatrices
from quantlab.runtime.banks.dense_product import _torch_dense_product
from quantlab.runtime.banks.groups import single_group
from quantlab.runtime.banks.int4_torch import TorchInt4Matrices
from quantlab.runtime.banks.int8 import Int8Matrices
from quantlab.runtime.device import free_bytes
from quantlab.runtime.modules.linear import dense_linear
from quantlab.runtime.native.library import status

SHAPES = ((22016, 2048), (2816, 2048), (2048, 1408), (2048, 11008), (7680, 2048))
CACHES = Path("/sys/devices/system/cpu")
LEAST_BYTES = 160_000_000
"""Smallest working set: bytes of weights per format."""
SIDES = 10
"""Working sets in memory at the same time: two or more for every format."""


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
    dtype: torch.dtype


def sides(rows: int, columns: int, held: int) -> dict[str, Side]:
    """For every format, torch's operator and the module or bank of a loaded model.

    Args:
        rows: rows of a matrix.
        columns: columns of a matrix.
        held: bytes of weights per format.
    """
    dense = max(-(-held // (2 * rows * columns)), 2)
    found: dict[str, Side] = {}
    for dtype, name in ((torch.float16, "fp16"), (torch.bfloat16, "bf16")):
        bank = DenseMatrices(dense, rows, columns, dtype)
        bank.weight.normal_(std=0.02)
        nbytes = bank.weight.nbytes // dense
        found[f"{name}, torch"] = Side(
            lambda x, i, bank=bank: _torch_dense_product(x, bank.weight[i]), dense, nbytes, dtype
        )
        layers = [dense_linear(weight.clone(), None) for weight in bank.weight]
        found[f"{name}, runtime"] = Side(lambda x, i, layers=layers: layers[i](x), dense, nbytes, dtype)
    for scheme, name in (("int8", "int8"), ("int8_weight", "int8_weight"), ("int4_g128", "int4_g128")):
        found |= quantized(scheme, name, (rows, columns), held)  # type: ignore[arg-type]
    return found


def quantized(scheme: SchemeName, name: str, shape: tuple[int, int], held: int) -> dict[str, Side]:
    """torch's operator and the bank of a loaded model, on random integers."""
    rows, columns = shape
    count = max(-(-held * 8 // (SCHEMES[scheme].format.bits * rows * columns)), 2)
    bank = quantized_matrices(SCHEMES[scheme].format, count, rows, columns, scale_dtype=torch.bfloat16)
    for tensor in bank.buffers():
        if tensor.is_floating_point():
            tensor.fill_(0.01)
        else:
            tensor.view(torch.uint8).random_(0, 256)
    nbytes = sum(tensor.nbytes for tensor in bank.buffers()) // count
    groups = [type(single_group(1))((index,), (1,), None) for index in range(count)]

    def ours(x: Tensor, index: int) -> Tensor:
        group = groups[index] if x.shape[0] == 1 else type(single_group(1))((index,), (x.shape[0],), None)
        return bank.products(x, group)

    found = {f"{name}, runtime": Side(ours, count, nbytes, torch.bfloat16)}
    if isinstance(bank, Int8Matrices):
        return {f"{name}, torch": Side(bank._torch_product, count, nbytes, torch.bfloat16)} | found
    if scheme == "int8_weight":
        operator = torch.ops.aten._weight_int8pack_mm.default
        return {
            f"{name}, torch": Side(lambda x, i: operator(x, bank.q[i], bank.scale[i]), count, nbytes, torch.bfloat16)
        } | found
    number = SCHEMES[scheme].format
    if TorchInt4Matrices.can_hold(number, (rows, columns), torch.bfloat16) is None:
        packed = TorchInt4Matrices(number, count, rows, columns, scale_dtype=torch.bfloat16)
        packed.packed.random_(0, 256)
        nbytes = (packed.packed.nbytes + packed.scale.nbytes) // count
        return {f"{name}, torch": Side(packed._packed_product, count, nbytes, torch.bfloat16)} | found
    return found


def read_rate(held: int) -> float:
    """GB/s of summing a tensor of `held` bytes."""
    tensor = torch.ones(held // 8, dtype=torch.int64)
    rates = []
    for _ in range(9):
        start = time.perf_counter()
        tensor.sum()
        rates.append(tensor.nbytes / (time.perf_counter() - start) / 1e9)
    return statistics.median(rates)


def timed(chosen: dict[str, Side], rows: int, columns: int, *, rounds: int) -> Iterator[tuple[str, float]]:
    """Median seconds of each implementation."""
    inputs = {dtype: torch.randn(rows, columns).to(dtype) for dtype in (torch.float16, torch.bfloat16)}
    turns = {name: itertools.cycle(range(side.count)) for name, side in chosen.items()}
    times: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(rounds + 2):
        for name, side in chosen.items():
            index = next(turns[name])
            start = time.perf_counter()
            side.product(inputs[side.dtype], index)
            times[name].append(time.perf_counter() - start)
    for name, values in times.items():
        yield name, statistics.median(values[2:])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="rows of activations")
    parser.add_argument("--rounds", type=int, default=20, help="timed turns of each format")
    arguments = parser.parse_args()
    held, from_memory = working_set()
    cache = last_level_cache()
    mark = "" if from_memory else " cached"
    known = "of unknown size" if cache is None else f"of {cache / 1e6:.0f} MB"
    title = (
        f"µs (GB/s of weights), {torch.get_num_threads()} threads, {status()}, {held / 1e6:.0f} MB of weights per format, "
        f"last-level cache {known}, memory read at {read_rate(held):.0f} GB/s{mark}"
    )
    for rows in arguments.rows:
        table = Table(title=f"{rows} row{'s' if rows > 1 else ''}: {title}")
        columns = []
        for shape in SHAPES:
            chosen = sides(*shape, held)
            medians = dict(timed(chosen, rows, shape[1], rounds=arguments.rounds))
            columns.append(
                {name: f"{1e6 * t:.0f} ({chosen[name].nbytes / t / 1e9:.0f}{mark})" for name, t in medians.items()}
            )
            del chosen
        for heading in ("format", *(f"{n}x{k}" for n, k in SHAPES)):
            table.add_column(heading, justify="left" if heading == "format" else "right")
        for name in dict.fromkeys(name for column in columns for name in column):
            table.add_row(name, *(column.get(name, "–") for column in columns))
        Console(width=150).print(table)


if __name__ == "__main__":
    main()
