"""Memory: an artifact's size on disk, the size of its loaded weights, and the peak during use."""

import fcntl
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from quantlab.architectures.detect import of_model_type
from quantlab.architectures.layer import LatentAttention
from quantlab.checkpoint.index import INDEX_NAME, open_checkpoint
from quantlab.evaluation.machine.time_and_memory import now, peak_bytes, reset_peak
from quantlab.evaluation.memory.metrics import Expanded, Memory
from quantlab.evaluation.processes.messages import MemoryRequest, Progress
from quantlab.evaluation.statistics import median
from quantlab.evaluation.suite import load_suite
from quantlab.runtime.cache_arguments import cache_arguments
from quantlab.runtime.device import find_device
from quantlab.runtime.inventory import expanded, weight_bytes
from quantlab.runtime.load import load

_MOST_LOADS = 5
_LOADING_SECONDS = 0.5
_CACHE_LENGTHS = (8, 24)
_COMPANIONS = ("config.json", INDEX_NAME, "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def measure_memory(request: MemoryRequest, progress: Progress) -> Memory:
    """Load an artifact in its own dtype, as it is served, and read one window of text.

    This is separate from quality, which computes in float32 and so doubles the size of weights that are not quantized.

    Raises:
        QuantlabError: the artifact cannot be loaded.
    """
    suite = load_suite(request.suite).suite
    device = find_device(request.device)
    if device.type == "cuda":  # a CPU process starts with a fresh peak; CUDA's must be reset
        reset_peak(device)

    def loading(done: int, total: int) -> None:
        if 100 * done // total > 100 * (done - 1) // total:  # at most a hundred updates, for any number of weights
            progress("loading", done, total)

    with _in_turn(request.turn):
        start = now(device)
        model = load(request.directory, device=device, progress=loading)
        seconds = [now(device) - start]
    counted, fallbacks = weight_bytes(model), expanded(model)
    ids = torch.arange(suite.text.length, device=device)[None] % model.config.vocab_size
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    peak = peak_bytes(device)
    # repeat loading only after reading the peak: two models in memory would raise it
    with _in_turn(request.turn):
        while len(seconds) < _MOST_LOADS and sum(seconds) < _LOADING_SECONDS:
            del model
            gc.collect()
            start = now(device)
            model = load(request.directory, device=device)
            seconds.append(now(device) - start)
    growth, kind = cache_bytes(model)
    quantized = 100 * counted.quantized / counted.quantized_fp16 if counted.quantized_fp16 else None
    return Memory(
        weights_bytes=counted.total,
        fp16_weights_bytes=counted.fp16,
        quantized_weights_percent_of_fp16=quantized,
        artifact_bytes=artifact_bytes(request.directory),
        peak_memory_bytes=peak,
        peak_memory_of="cuda" if device.type == "cuda" else "process",
        load_seconds=median(np.array(seconds)),
        kv_cache_bytes_per_token=growth,
        kv_cache=kind,
        expanded=tuple(Expanded(**asdict(fallback)) for fallback in fallbacks),
    )


@contextmanager
def _in_turn(path: Path | None) -> Iterator[None]:
    """Hold the lock of the cells that run side by side; no lock for a cell that runs alone."""
    if path is None:
        yield
        return
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@torch.inference_mode()
def cache_bytes(model: PreTrainedModel) -> tuple[int, str]:
    """Bytes by which the cache of all layers grows per token, and a description of its contents.

    Computed from the tensors of a cache that the model filled, so it shows whether the runtime caches latents.
    """
    caches = []
    for length in _CACHE_LENGTHS:
        cache = DynamicCache(config=model.config)
        ids = torch.arange(length, device=model.device)[None] % model.config.vocab_size
        model(input_ids=ids, **cache_arguments(cache), logits_to_keep=1)
        caches.append([(layer.keys, layer.values) for layer in cache.layers])
    shorter, longer = (sum(keys.nbytes + values.nbytes for keys, values in cache) for cache in caches)
    keys, values = caches[0][0]
    architecture = of_model_type(model.config.model_type)
    latents = architecture is not None and isinstance(architecture.attention, LatentAttention) and keys.shape[1] == 1
    dtype, what = str(keys.dtype).removeprefix("torch."), "latent of" if latents else f"{keys.shape[1]} heads of"
    kind = f"{what} {keys.shape[-1]} + {values.shape[-1]} {dtype} values, {len(caches[0])} layers"
    return (longer - shorter) // (_CACHE_LENGTHS[1] - _CACHE_LENGTHS[0]), kind


def artifact_bytes(directory: Path) -> int:
    """Bytes on disk of the files that an engine reads: shards, configuration and tokenizer."""
    shards = set(open_checkpoint(directory).files)
    companions = {directory / name for name in _COMPANIONS if (directory / name).is_file()}
    return sum(path.stat().st_size for path in shards | companions)
