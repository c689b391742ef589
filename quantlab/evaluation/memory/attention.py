"""Memory of a long context beyond the weights, and its speed, under one implementation of attention.

A random-weight twin reads one sequence into a growing cache, which every implementation supports, and decodes a few tokens after
it. The measured memory is the peak above the weights, including the cache. Decoding is measured first, with a cache filled by
repeating a few tokens, because memory used by the prefill would otherwise still belong to the process. Each combination runs in
its own process.

A combination that cannot fit into memory is not tried: the scores of unfused attention alone are heads x context x context.

`quantlab_latent_sdpa` is the runtime's own implementation. For multi-head latent attention (MLA) the cache holds latents under
every implementation, but only this one decodes without expanding them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from quantlab.errors import DeviceError
from quantlab.evaluation.machine.contention import rounds_spread
from quantlab.evaluation.machine.time_and_memory import (
    held_bytes,
    now,
    peak_bytes,
    release_memory,
    reset_peak,
    with_contention,
)
from quantlab.evaluation.processes.messages import AttentionRequest, AttentionResult, Progress
from quantlab.evaluation.record import AttentionCell
from quantlab.evaluation.speed.models import DTYPES, Layout, layout_name, layout_of
from quantlab.evaluation.speed.own_layers import own_layers
from quantlab.evaluation.statistics import Floats, median
from quantlab.evaluation.suite import load_suite
from quantlab.files import read_json
from quantlab.runtime.cache_arguments import cache_arguments
from quantlab.runtime.device import find_device, free_bytes, is_out_of_memory
from quantlab.runtime.twin import random_twin

BYTES_PER_SCORE: Final = 12
"""Bytes per score of unfused attention: 16-bit scores, masked scores and weights, float32 softmax."""
_SHARE: Final = 0.8
"""Share of the free memory that a combination may need."""
_SEED: Final = 0
_FEW: Final = 8


@dataclass(frozen=True)
class Case:
    """One combination.

    Attributes:
        implementation: implementation of attention.
        context: context length in tokens.
        steps: tokens decoded per repeat.
        repeats: maximum repeats of the prefill and of the decode.
        seconds: time in seconds after which no further repeat of either starts.
    """

    implementation: str
    context: int
    steps: int = 1
    repeats: int = 1
    seconds: float = 0.0


def measure_attention(request: AttentionRequest, progress: Progress) -> AttentionResult:
    """Measure one combination on the suite's twin, with the weight layout of an artifact.

    Raises:
        QuantlabError: the device does not exist, or the twin cannot be built.
    """
    suite = load_suite(request.suite).suite
    assert suite.attention is not None, "the suite has an attention section"
    wanted, (_, shape) = suite.attention, suite.attention_twin
    progress("attention", 0, 1)
    case = Case(request.implementation, request.context, wanted.steps, wanted.repeats, wanted.seconds)
    layers: Sequence[int] = ()
    if not shape:
        own = own_layers(read_json(request.directory / "config.json"))
        shape, layers = dict(own.config), own.layers
    return measure_case(shape, layout_of(request.directory), case, find_device(request.device), layers)


def measure_case(
    shape: Mapping[str, Any], layout: Layout, case: Case, device: torch.device, layers: Sequence[int] = ()
) -> AttentionResult:
    """Measure a combination, or return the reason why it was not measured.

    Args:
        shape: config.json of the twin.
        layout: layout of its weights.
        case: the combination.
        device: device of the twin.
        layers: for each layer of the twin, its number in the layout; its own number if empty.
    """

    def failed(reason: str) -> AttentionResult:
        return AttentionResult(
            cell=AttentionCell(implementation=case.implementation, context=case.context, reason=reason)
        )

    free, needed = free_bytes(device), needed_bytes(shape, case, device)
    if free is not None and needed > _SHARE * free:
        return failed(f"not tried: about {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
    config = {**shape, "max_position_embeddings": case.context + case.steps}
    try:
        model = random_twin(
            config,
            layout.quantization,
            dtype=DTYPES[layout.dtype],
            seed=_SEED,
            device=device,
            attention=case.implementation,
            layers=layers,
        )
        return AttentionResult(cell=measure_model(model, case), layout=layout_name(layout, model))
    except DeviceError as error:
        return failed(f"not tried: {error.found}")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return failed("out of memory")


def needed_bytes(shape: Mapping[str, Any], case: Case, device: torch.device) -> int:
    """Estimate of the bytes of a prefill beyond the weights: activations and cache, and the scores of unfused attention."""
    heads = int(shape["num_attention_heads"])
    latent = "qk_nope_head_dim" in shape
    width = shape["qk_nope_head_dim"] + shape["qk_rope_head_dim"] if latent else shape["hidden_size"] // heads
    per_token = 2 * (8 * shape["hidden_size"] + 4 * shape["intermediate_size"] + 4 * heads * width)
    # torch's fused CPU kernel requires equal widths of query and value heads, which MLA does not have
    unfused = case.implementation == "eager" or (case.implementation == "sdpa" and latent and device.type == "cpu")
    return int(per_token * case.context + unfused * BYTES_PER_SCORE * heads * case.context**2)


@torch.inference_mode()
def measure_model(model: PreTrainedModel, case: Case) -> AttentionCell:
    """Measure peaks above the weights, bytes of the cache and tokens per second."""
    device = model.device
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(int(model.config.vocab_size), (1, case.context), generator=generator).to(device)
    few = DynamicCache(config=model.config)
    for part in (ids[:, :_FEW], ids[:, :1]):  # compile kernels and start thread pools before measuring
        model(input_ids=part, **cache_arguments(few), logits_to_keep=1)
    release_memory()
    held = held_bytes(device)

    def both() -> tuple[_Repeats, _Repeats]:
        decode = _decode(model, few, ids[:, :1], case)
        release_memory()
        reset_peak(device)
        return decode, _repeat(lambda: _read(model, ids), case, device)

    (decode, prefill), others = with_contention(both, device)
    rates = {
        "prefill_tokens_per_second": case.context / prefill.seconds,
        "decode_tokens_per_second": case.steps / decode.seconds,
    }
    return AttentionCell(
        implementation=case.implementation,
        context=case.context,
        prefill_peak_bytes=max(prefill.peak - held, 0),
        decode_peak_bytes=max(decode.peak - held, 0) if decode.peak else None,
        cache_bytes=decode.cache_bytes,
        quartiles={
            name: (float(np.quantile(values, 0.25)), float(np.quantile(values, 0.75)))
            for name, values in rates.items()
            if len(values) > 1
        },
        noise={name: reason for name, values in rates.items() if (reason := others or rounds_spread(values))},
        prefill_tokens_per_second=median(rates["prefill_tokens_per_second"]),
        decode_tokens_per_second=median(rates["decode_tokens_per_second"]),
    )


@dataclass(frozen=True)
class _Repeats:
    """Peak bytes of the first repeat, 0 if unknown; seconds of every repeat [n]; initial bytes of the cache."""

    peak: int
    seconds: Floats
    cache_bytes: int = 0


def _read(model: PreTrainedModel, ids: Tensor) -> None:
    model(input_ids=ids, **cache_arguments(DynamicCache(config=model.config)), logits_to_keep=1)


def _decode(model: PreTrainedModel, few: DynamicCache, token: Tensor, case: Case) -> _Repeats:
    cache = _repeated(few, case.context, model)
    held = sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in cache.layers)
    forgotten = reset_peak(model.device)

    def steps() -> None:
        for _ in range(case.steps):
            model(input_ids=token, **cache_arguments(cache), logits_to_keep=1)
        cache.crop(-case.steps)

    found = _repeat(steps, case, model.device)
    return replace(found, peak=found.peak if forgotten else 0, cache_bytes=held)


def _repeat(work: Callable[[], None], case: Case, device: torch.device) -> _Repeats:
    seconds: list[float] = []
    peak, begin = 0, time.perf_counter()
    while not seconds or (len(seconds) < case.repeats and time.perf_counter() - begin < case.seconds):
        start = now(device)
        work()
        seconds.append(now(device) - start)
        peak = peak or peak_bytes(device)
    return _Repeats(peak, np.array(seconds))


def _repeated(few: DynamicCache, context: int, model: PreTrainedModel) -> DynamicCache:
    """A cache of `context` tokens that repeats the tokens of `few`."""

    def longer(held: Tensor) -> Tensor:
        return held.repeat(1, 1, -(-context // held.shape[2]), 1)[:, :, :context]

    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(few.layers):
        cache.update(longer(layer.keys), longer(layer.values), index)
    return cache
