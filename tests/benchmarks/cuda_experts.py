"""Routed experts of a layer on a GPU against torch's BF16 grouped_mm: python tests/benchmarks/cuda_experts.py [--out
PREFIX]

Both products (gate and up; down) at the shapes of DeepSeek-V3 and V2-Lite. torch's time is that of its two grouped
products alone, on sorted rows; ours is that of the whole module: sorting, both products, gating and the weighted sum.
Every launch in a captured graph has its own routing.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from cuda_timing import copy_rate, hardware, interleaved

from quantlab.recipe.schemes import SCHEMES, SchemeName
from quantlab.runtime.banks.choice import quantized_matrices
from quantlab.runtime.banks.dense import DenseMatrices
from quantlab.runtime.modules.experts import Experts

MODELS = {"DeepSeek-V3": (256, 7168, 2048, 8), "DeepSeek-V2-Lite": (64, 2048, 1408, 6)}
TOKENS = (1, 16, 256)
KINDS: tuple[SchemeName, ...] = ("int4_g128", "int8_weight", "int8")
ROUTINGS = 16


def dense(experts: int, rows: int, columns: int) -> DenseMatrices:
    with torch.device("cuda"):
        bank = DenseMatrices(experts, rows, columns, torch.bfloat16)
    for matrix in bank.weight:
        matrix.normal_(std=columns**-0.5)
    return bank


def packed(scheme: SchemeName, experts: int, rows: int, columns: int) -> nn.Module:
    bank = quantized_matrices(
        SCHEMES[scheme].format, experts, rows, columns, scale_dtype=torch.bfloat16, device=torch.device("cuda")
    )
    bank.q.random_(*((-32768, 32768) if bank.q.dtype == torch.int16 else (-128, 128)))
    bank.scale.fill_(columns**-0.5 / (4.6 if scheme.startswith("int4") else 74))
    return bank


def grouped(x: Tensor, index: Tensor, first: Tensor, second: Tensor, middle: Tensor) -> list[functools.partial[Tensor]]:
    """Calls of torch's two grouped products for one routing."""
    flat = index.flatten()
    ends = torch.bincount(flat, minlength=first.shape[0]).cumsum(0).to(torch.int32)
    rows = x[flat.argsort(stable=True) // index.shape[1]].contiguous()
    return [
        functools.partial(torch._grouped_mm, rows, first.transpose(1, 2), offs=ends),
        functools.partial(torch._grouped_mm, middle, second.transpose(1, 2), offs=ends),
    ]


def measure(name: str) -> list[dict[str, object]]:
    experts, hidden, width, top_k = MODELS[name]
    first, second = dense(experts, 2 * width, hidden), dense(experts, hidden, width)
    modules = {"bfloat16": Experts(first, second, nn.SiLU())}
    for scheme in KINDS:
        banks = packed(scheme, experts, 2 * width, hidden), packed(scheme, experts, hidden, width)
        modules[scheme] = Experts(*banks, nn.SiLU())
    lines = []
    for tokens in TOKENS:
        x = torch.randn(tokens, hidden, device="cuda").bfloat16()
        weights = torch.rand(tokens, top_k, device="cuda")
        routings = [
            torch.stack([torch.randperm(experts, device="cuda")[:top_k] for _ in range(tokens)])
            for _ in range(ROUTINGS)
        ]
        middle = torch.randn(tokens * top_k, width, device="cuda").bfloat16()
        pairs = [grouped(x, index, first.weight, second.weight, middle) for index in routings]
        sides = {"grouped_mm": [lambda pair=pair: [call() for call in pair] for pair in pairs]}
        for kind, module in modules.items():
            sides[kind] = [functools.partial(module, x, index, weights) for index in routings]
        taken = interleaved(sides, rounds=7)
        hit = sum(index.unique().numel() for index in routings) / ROUTINGS
        for kind, microseconds in taken.items():
            bits = {"grouped_mm": 16, "bfloat16": 16, "int4_g128": 4.125}.get(kind, 8)
            lines.append(
                {
                    "model": name,
                    "tokens": tokens,
                    "kind": kind,
                    "microseconds": round(microseconds, 2),
                    "over_grouped_mm": round(taken["grouped_mm"] / microseconds, 3),
                    "terabytes_per_second": round(hit * 3 * hidden * width * bits / 8 / microseconds / 1e6, 3),
                }
            )
    return lines


def table(lines: list[dict[str, object]]) -> str:
    text = [
        "| model | tokens | kind | time, µs | over grouped_mm | TB/s of the weights of the experts hit |",
        "|---|---|---|---|---|---|",
    ]
    text += [
        "| {model} | {tokens} | {kind} | {microseconds} | {over_grouped_mm:.2f} | {terabytes_per_second:.2f} |".format(
            **line
        )
        for line in lines
    ]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    torch.manual_seed(0)
    head = f"{hardware()}; device copy {copy_rate():.2f} TB/s."
    lines = [line for name in MODELS for line in measure(name)]
    print(head + "\n\n" + table(lines))
    if options.out is not None:
        options.out.with_suffix(".json").write_text(json.dumps({"hardware": head, "lines": lines}, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(head + "\n\n" + table(lines) + "\n")


if __name__ == "__main__":
    main()
