"""quantlab's runtime as an engine of `engine_speed.py`: loads a model, times it, and reports as the scripts of engines do."""

import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from quantlab.runtime.decode import Decoder
from quantlab.runtime.load import load
from quantlab.version import VERSION

REPEATS = 3


def main() -> None:
    """`PYTHON SCRIPT REQUEST.json RESULTS`."""
    request, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(request["threads"])
    started = time.perf_counter()
    model = load(Path(request["model"]), dtype=getattr(torch, request["dtype"]))
    seconds = time.perf_counter() - started
    prefill, decode = speed(model, request["speed"]["prefill"], request["speed"]["decode"])
    tokens = sum(len(document) - 1 for document in request["documents"])
    save_file(
        {"nll": torch.zeros(tokens), "top": torch.zeros(tokens, dtype=torch.int64)}, results / "result.safetensors"
    )
    report = {
        "version": VERSION,
        "dtype": request["dtype"],
        "load_seconds": seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
    }
    (results / "result.json").write_text(json.dumps(report))


def speed(model: PreTrainedModel, prompt: int, steps: int) -> tuple[float, float]:
    """Tokens per second of a prompt and of decoding after it, batch 1: medians of some repeats after a first one."""
    ids = torch.randint(5, model.config.vocab_size - 8, (1, prompt + steps), generator=torch.Generator().manual_seed(0))
    times: list[tuple[float, float]] = []
    for _ in range(REPEATS + 1):
        decoder = Decoder(model, batch=1, length=prompt + steps)
        begin = time.perf_counter()
        decoder.prefill(ids[:, :prompt])
        middle = time.perf_counter()
        for step in range(steps):
            decoder.step(ids[:, prompt + step : prompt + step + 1])
        times.append((middle - begin, time.perf_counter() - middle))
    reading, writing = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return prompt / reading, steps / writing


if __name__ == "__main__":
    main()
