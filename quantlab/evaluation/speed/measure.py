"""Speed: every distinct layout of a recipe's artifacts, timed in one process.

`models.py` chooses the timed models. The speed of a machine drifts within seconds (clock, caches, other processes). So all models
are in memory together, every round times each of them in a new random order, and a ratio to FP16 is taken within a turn.
`rates.py` combines the results of several such processes.

Steps decode from a cache of fixed size, as in serving engines, and are fused if `quantlab.runtime.decoding.fused_step` supports
the model; on CUDA they are captured as a graph and replayed.
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from quantlab.errors import QuantlabError
from quantlab.evaluation.machine.energy import meter
from quantlab.evaluation.machine.time_and_memory import now, with_contention
from quantlab.evaluation.processes.messages import ModelTimings, Progress, SpeedRequest, SpeedResult
from quantlab.evaluation.speed.models import Layout, ModelBuilder, choose_builder, fp16_of, layout_name, layout_of
from quantlab.evaluation.suite import SpeedSuite, load_suite
from quantlab.runtime.cache_arguments import cache_arguments
from quantlab.runtime.cpu_operators import native_kernels
from quantlab.runtime.decode import Decoder
from quantlab.runtime.device import find_device
from quantlab.runtime.inventory import weight_bytes

LEAST_ROUNDS = 3
"""Minimum rounds of one process."""
_SEED = 0


@dataclass(frozen=True)
class Task:
    """A timed task: `tokens` new tokens for each of `batch` sequences, decoded one by one or read in one prefill."""

    kind: Literal["decode", "prefill"]
    batch: int
    tokens: int


@dataclass(frozen=True)
class TimedModel:
    """A model ready for timing, with a filled cache for every batch size."""

    model: PreTrainedModel
    decoders: Mapping[int, Decoder]
    name: str


def measure_speed(request: SpeedRequest, progress: Progress) -> SpeedResult:
    """Time the layouts of all artifacts, interleaved.

    Raises:
        QuantlabError: the FP16 model cannot be built, so no ratio can be computed, or no artifact has a layout to time.
    """
    suite = load_suite(request.suite).suite.speed
    assert suite is not None, "the suite measures speed"
    layouts, refused = _layouts(request, own_shape=not suite.shape)
    if not layouts or request.only_prepare in refused:
        raise refused[request.only_prepare or next(iter(refused))]
    fp16 = fp16_of(layouts.values(), request.source)
    directories = {fp16: request.source}
    for variant, layout in layouts.items():
        directories.setdefault(layout, request.artifacts[variant])
    device = find_device(request.device)
    builder = choose_builder(suite, directories, device, request.timed)
    if request.only_prepare:
        directories = {layout: directories[layout] for layout in [layouts[request.only_prepare]]}
    timed_models, reasons = _built(builder, directories, suite, request.device, progress)
    if request.only_prepare:
        return SpeedResult(timed=builder.timed, model=builder.description)
    if fp16 in reasons:
        raise reasons[fp16]
    timings, others = with_contention(lambda: time_rounds(timed_models, suite, progress, seed=request.process), device)
    joules, others_of_energy = with_contention(lambda: read_energy(timed_models, suite, seed=request.process), device)
    return SpeedResult(
        timed=builder.timed,
        model=builder.description,
        computed_by=_computed_by(timed_models.values()),
        timings=tuple(
            ModelTimings(
                layout=timed_model.name,
                is_fp16=layout == fp16,
                variants=tuple(variant for variant, one in layouts.items() if one == layout),
                memory_percent_of_fp16=100 * held.total / held.fp16,
                rates={f"{task.kind}.{task.batch}": values for task, values in timings[layout].items()},
                joules=joules.get(layout, {}),
                not_fused=next(iter(timed_model.decoders.values())).not_fused,  # the same at every batch size
            )
            for layout, timed_model in timed_models.items()
            for held in [weight_bytes(timed_model.model)]
        ),
        failures={variant: str(error) for variant, error in refused.items()}
        | {variant: str(reasons[layout]) for variant, layout in layouts.items() if layout in reasons},
        others=others,
        others_of_energy=others_of_energy,
    )


def _layouts(request: SpeedRequest, *, own_shape: bool) -> tuple[dict[str, Layout], dict[str, QuantlabError]]:
    """The layout of every artifact, or the error that one has none to time."""
    layouts: dict[str, Layout] = {}
    refused: dict[str, QuantlabError] = {}
    for variant, directory in request.artifacts.items():
        try:
            layouts[variant] = layout_of(directory, own_shape=own_shape)
        except QuantlabError as error:
            refused[variant] = error
    return layouts, refused


def _built(
    builder: ModelBuilder, directories: Mapping[Layout, Path], suite: SpeedSuite, device: str, progress: Progress
) -> tuple[dict[Layout, TimedModel], dict[Layout, Exception]]:
    """A model of every layout ready for timing, or the error that prevented it."""
    timed_models: dict[Layout, TimedModel] = {}
    reasons: dict[Layout, Exception] = {}
    for index, (layout, directory) in enumerate(directories.items()):
        progress("building models", index, len(directories))
        try:
            model = builder.build(layout, directory, device=device)
            timed_models[layout] = prepare(model, suite, layout_name(layout, model))
        except (QuantlabError, RuntimeError, ValueError) as error:  # torch raises the last two
            reasons[layout] = error
    progress("building models", len(directories), len(directories))
    return timed_models, reasons


def prepare(model: PreTrainedModel, suite: SpeedSuite, name: str) -> TimedModel:
    """Fill the caches of a model and run every kind of step once as a warm-up.

    All sequences of a batch share one context; its contents do not affect the time of a step.

    Args:
        model: the model to time.
        suite: batch sizes and lengths.
        name: name of its layout.
    """
    prompt = DynamicCache(config=model.config)
    with torch.inference_mode():
        ids = _tokens(1, suite.prompt, int(model.config.vocab_size)).to(model.device)
        model(input_ids=ids, **cache_arguments(prompt), logits_to_keep=1)
    decoders: dict[int, Decoder] = {}
    for batch in suite.batches:
        decoders[batch] = Decoder(model, batch=batch, length=suite.prompt + suite.steps)
        decoders[batch].fill(prompt)
    timed_model = TimedModel(model, decoders, name)
    for batch in suite.batches:
        run_task(timed_model, Task("decode", batch, 1))
    for batch in set(suite.prefill_batches) - {1}:  # batch size 1 was warmed up by the prompt
        run_task(timed_model, Task("prefill", batch, suite.prompt))
    return timed_model


def tasks(suite: SpeedSuite) -> tuple[Task, ...]:
    """The tasks that one round times on each model."""
    decode = (Task("decode", batch, suite.steps) for batch in suite.batches)
    return (*decode, *(Task("prefill", batch, suite.prompt) for batch in suite.prefill_batches))


def time_rounds(
    timed_models: Mapping[Layout, TimedModel], suite: SpeedSuite, progress: Progress, *, seed: int
) -> dict[Layout, dict[Task, tuple[float, ...]]]:
    """Tokens per second of every model and task; entry i is from the same turn in all models.

    In a round each task has at least one turn. Short tasks have several: two steps at batch size 1 are too short to time.
    """
    wanted = tasks(suite)
    rates: dict[Layout, dict[Task, tuple[float, ...]]] = {layout: dict.fromkeys(wanted, ()) for layout in timed_models}
    most, limit = -(-suite.rounds // suite.processes), suite.seconds / suite.processes
    generator = np.random.default_rng((_SEED, seed))
    order = list(timed_models)
    start = time.perf_counter()
    done = 0
    while done < LEAST_ROUNDS or (done < most and time.perf_counter() - start < limit):
        progress("timing rounds", done, most)
        for task in wanted:
            taken = 0.0
            while taken <= suite.task_seconds:
                for index in generator.permutation(len(order)):
                    seconds = run_task(timed_models[order[index]], task)
                    rates[order[index]][task] += (task.batch * task.tokens / seconds,)
                    taken += seconds
        done += 1
    progress("timing rounds", done, done)
    return rates


@torch.inference_mode()
def run_task(timed_model: TimedModel, task: Task) -> float:
    """Run one task; returns its seconds. Every decode starts from the same filled cache."""
    model = timed_model.model
    tokens = _tokens(task.batch, task.tokens, int(model.config.vocab_size)).to(model.device)
    if task.kind == "prefill":
        cache = DynamicCache(config=model.config)
        start = now(model.device)
        model(input_ids=tokens, **cache_arguments(cache), logits_to_keep=1)
        return now(model.device) - start
    decoder = timed_model.decoders[task.batch]
    start = now(model.device)
    for step in range(task.tokens):
        decoder.step(tokens[:, step])
    seconds = now(model.device) - start
    decoder.rewind(decoder.used - task.tokens)
    return seconds


def read_energy(
    timed_models: Mapping[Layout, TimedModel], suite: SpeedSuite, *, seed: int
) -> dict[Layout, dict[str, tuple[float, ...]]]:
    """Joules per decoded token by batch size, over alternating intervals of steady decoding; empty without an energy meter."""
    device = next(iter(timed_models.values())).model.device
    joules = meter(device) if suite.energy_seconds else None
    if joules is None:
        return {}
    decodes = [task for task in tasks(suite) if task.kind == "decode"]
    found: dict[Layout, dict[str, tuple[float, ...]]] = {
        layout: {str(task.batch): () for task in decodes} for layout in timed_models
    }
    generator = np.random.default_rng((_SEED, seed))
    order = list(timed_models)
    stretch = suite.energy_seconds / suite.processes / LEAST_ROUNDS
    for _ in range(LEAST_ROUNDS):
        for task in decodes:
            for index in generator.permutation(len(order)):
                begin, start, tokens = joules(), now(device), 0
                while now(device) - start < stretch:
                    run_task(timed_models[order[index]], task)
                    tokens += task.batch * task.tokens
                found[order[index]][str(task.batch)] += ((joules() - begin) / tokens,)
    return found


def _computed_by(timed_models: Collection[TimedModel]) -> str:
    """The GPU, or the operators that the CPU runs, and how steps run; all variants of it if models differ."""
    device = next(iter(timed_models)).model.device
    paths = sorted({decoder.path for timed_model in timed_models for decoder in timed_model.decoders.values()})
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else native_kernels()
    return f"{name}, {' or '.join(paths)}"


def _tokens(batch: int, length: int, vocabulary: int) -> Tensor:
    """Random token ids [batch, length], equal for every model and round."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(vocabulary, (batch, length), generator=generator)
