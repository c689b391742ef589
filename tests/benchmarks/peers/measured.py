"""What every peer is given and what is written down of it: the same tokens, two threads, seconds, peak memory, versions.

Imported by scripts that run in environments of different peers, so it needs torch and nothing else.
"""

import argparse
import importlib.metadata
import json
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

THREADS = 2
PACKAGES = ("torch", "transformers", "compressed-tensors", "llmcompressor", "gptqmodel", "auto-round", "quantlab")


@dataclass(frozen=True)
class Task:
    """One artifact to make.

    Attributes:
        model: the BF16 checkpoint.
        tokens: calibration samples [128, 512] int64.
        out: where the artifact goes.
        variant: which of the script's variants.
    """

    model: Path
    tokens: torch.Tensor
    out: Path
    variant: str


def parse_task(variants: tuple[str, ...]) -> Task:
    """The task of the command line; sets the threads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("variant", choices=variants)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    tokens = torch.load(arguments.tokens, weights_only=True)
    return Task(arguments.model, tokens, arguments.out, arguments.variant)


def report(task: Task, quantize: Callable[[], object], save: Callable[[], object]) -> None:
    """Quantize, save, and write seconds and peak memory beside the artifact (`<out>.json`).

    Seconds of the processor, all threads together, stand beside those of the clock: other work on the machine lengthens
    the clock's much and the processor's little. The load says how much other work there was.
    """
    before, busy = peak_bytes(), processor_seconds()
    start = time.perf_counter()
    quantize()
    quantized = time.perf_counter()
    busy, peak, load = processor_seconds() - busy, peak_bytes(), os.getloadavg()[1]
    save()
    saved = time.perf_counter()
    result = {
        "variant": task.variant,
        "quantize_seconds": round(quantized - start, 1),
        "processor_seconds": round(busy, 1),
        "load_average_5_minutes": round(load, 1),
        "save_seconds": round(saved - quantized, 1),
        "peak_rss_bytes": peak,
        "peak_rss_before_bytes": before,
        "versions": installed(),
    }
    task.out.with_name(task.out.name + ".json").write_text(json.dumps(result, indent=2) + "\n")


def processor_seconds() -> float:
    """Seconds that processors have spent on this process and the children it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def installed() -> dict[str, str]:
    """Versions of the packages that matter, of those that are there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
