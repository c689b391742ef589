"""Packed linears on a GPU against torch's BF16 linear: python tests/benchmarks/cuda_linears.py [--out PREFIX]

Launches rotate through more weights than the L2 cache holds and are captured in CUDA graphs; all kinds of a shape and
number of tokens are interleaved. W8A8 includes the quantization of tokens. Bytes count weights, scales and activations
once.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from cuda_timing import copy_rate, hardware, interleaved

from quantlab.recipe.schemes import SCHEMES, SchemeName
from quantlab.runtime.banks.choice import quantized_matrices
from quantlab.runtime.cuda.banks import CudaMatrices

SHAPES = ((18432, 7168), (7168, 18432), (24576, 1536), (4096, 7168), (11008, 4096))
TOKENS = (1, 16, 64, 128, 192, 256, 384, 512, 768, 1024, 2048)
KINDS: tuple[SchemeName, ...] = ("int4_g128", "int4_g32", "int8_weight", "int8")
ROTATED_BYTES = 200_000_000


def banks(scheme: SchemeName, rows: int, columns: int) -> list[CudaMatrices]:
    """Random banks of one matrix each, together larger than the L2 cache."""
    made = []
    while not made or sum(bank.q.nbytes for bank in made) < ROTATED_BYTES or len(made) < 3:
        bank = quantized_matrices(
            SCHEMES[scheme].format, 1, rows, columns, scale_dtype=torch.bfloat16, device=torch.device("cuda")
        )
        assert isinstance(bank, CudaMatrices)
        low, high = (-32768, 32768) if bank.q.dtype == torch.int16 else (-128, 128)
        bank.q.random_(low, high)
        bank.scale.fill_(columns**-0.5 / (4.6 if bank.bits == 4 else 74))
        made.append(bank)
    return made


def measure(rows: int, columns: int) -> list[dict[str, object]]:
    count = max(2, -(-ROTATED_BYTES // (2 * rows * columns)))
    dense = [torch.randn(rows, columns, device="cuda").mul(columns**-0.5).bfloat16() for _ in range(count)]
    packed = {scheme: banks(scheme, rows, columns) for scheme in KINDS}
    lines = []
    for tokens in TOKENS:
        x = torch.randn(tokens, columns, device="cuda").bfloat16()
        sides = {"bfloat16": [functools.partial(functional.linear, x, weight) for weight in dense]}
        for scheme, each in packed.items():
            sides[scheme] = [functools.partial(bank.product, x) for bank in each]
        taken = interleaved(sides)
        for scheme, microseconds in taken.items():
            weights = 2 * rows * columns
            if scheme != "bfloat16":
                bank = packed[scheme][0]
                weights = bank.q.nbytes + bank.scale.nbytes
            lines.append(
                {
                    "rows": rows,
                    "columns": columns,
                    "tokens": tokens,
                    "kind": scheme,
                    "microseconds": round(microseconds, 2),
                    "over_bfloat16": round(taken["bfloat16"] / microseconds, 3),
                    "terabytes_per_second": round((weights + 2 * tokens * (rows + columns)) / microseconds / 1e6, 3),
                }
            )
    return lines


def table(lines: list[dict[str, object]]) -> str:
    """A row per shape and kind: speed relative to BF16, time and bytes per second, by number of tokens."""
    text = [
        "| (N, K) | | " + " | ".join(f"{tokens} tokens" for tokens in TOKENS) + " |",
        "|" + "---|" * (2 + len(TOKENS)),
    ]
    for rows, columns in SHAPES:
        for kind in ("bfloat16", *KINDS):
            cells = []
            for line in lines:
                if (line["rows"], line["columns"], line["kind"]) == (rows, columns, kind):
                    ratio = "" if kind == "bfloat16" else f"**{line['over_bfloat16']:.2f}** · "
                    cells.append(f"{ratio}{line['microseconds']:.1f} µs · {line['terabytes_per_second']:.2f}")
            text.append(f"| ({rows}, {columns}) | {kind} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    torch.manual_seed(0)
    rate = copy_rate()
    lines = [line for shape in SHAPES for line in measure(*shape)]
    head = (
        f"{hardware()}; device copy {rate:.2f} TB/s. Cells: speed over BF16 · time · TB/s of weights and activations."
    )
    print(head + "\n\n" + table(lines))
    if options.out is not None:
        data = {"hardware": hardware(), "copy_terabytes_per_second": rate, "lines": lines}
        options.out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(head + "\n\n" + table(lines) + "\n")


if __name__ == "__main__":
    main()
