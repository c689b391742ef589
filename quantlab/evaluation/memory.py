"""Memory: what an artifact takes on disk, what its weights take once loaded, and the peak of the process that uses it."""

import gc
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

from quantlab.checkpoint.index import INDEX_NAME, open_checkpoint
from quantlab.evaluation.jobs import MemoryRequest, Progress
from quantlab.evaluation.record import Memory
from quantlab.evaluation.statistics import median
from quantlab.evaluation.suite import load_suite
from quantlab.runtime.account import weight_bytes
from quantlab.runtime.load import load

_MOST_LOADS = 5
_LOADING_SECONDS = 1.0
_COMPANIONS = ("config.json", INDEX_NAME, "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def measure_memory(request: MemoryRequest, progress: Progress) -> Memory:
    """Load an artifact as it would be served, at its own dtype, and let it read one window.

    Not part of measuring quality: that computes in float32, which would count weights that were not quantized twice.

    Raises:
        QuantlabError: the artifact cannot be loaded.
    """
    suite = load_suite(request.suite).suite

    def loading(done: int, total: int) -> None:
        if 100 * done // total > 100 * (done - 1) // total:  # a hundred times for a bar, however many weights
            progress("loading", done, total)

    start = time.perf_counter()
    model = load(request.directory, progress=loading)
    seconds = [time.perf_counter() - start]
    counted = weight_bytes(model)
    ids = torch.arange(suite.text.length)[None] % model.config.vocab_size
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    peak = peak_bytes()
    # repeated only after the peak was read: two models at once would raise it
    while len(seconds) < _MOST_LOADS and sum(seconds) < _LOADING_SECONDS:
        del model
        gc.collect()
        start = time.perf_counter()
        model = load(request.directory)
        seconds.append(time.perf_counter() - start)
    quantized = 100 * counted.quantized / counted.quantized_fp16 if counted.quantized_fp16 else None
    return Memory(
        weights_bytes=counted.total,
        fp16_weights_bytes=counted.fp16,
        quantized_weights_percent_of_fp16=quantized,
        artifact_bytes=artifact_bytes(request.directory),
        peak_memory_bytes=peak,
        load_seconds=median(np.array(seconds)),
    )


def artifact_bytes(directory: Path) -> int:
    """Bytes on disk of the files an engine reads: the checkpoint's shards, configuration and tokenizer."""
    shards = set(open_checkpoint(directory).files)
    companions = {directory / name for name in _COMPANIONS if (directory / name).is_file()}
    return sum(path.stat().st_size for path in shards | companions)


def peak_bytes() -> int:
    """Largest resident size of this process so far (macOS counts bytes, everyone else KiB)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
