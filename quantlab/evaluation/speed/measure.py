"""Speed: every distinct layout of a recipe's artifacts, timed in one process on random-weight twins.

How long a step takes depends on shapes and layouts, not on what the weights are, so the twin has the width of the target
model, a few of its layers, and random weights in exactly the layout of the artifact. Machines drift: clocks, caches and
neighbours change within seconds. So all twins are alive at once, every round times each of them in a new random order,
and a ratio to the FP16 twin is taken within a turn. What several such processes found is put together in `rates.py`.

Steps decode from a cache of fixed size, as serving engines do it, in few operations where `quantlab.runtime.step` takes the model;
on CUDA they are captured as a graph and replayed.
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

from quantlab.errors import EvaluationError, QuantlabError
from quantlab.evaluation.machine.energy import meter
from quantlab.evaluation.machine.gauges import now, watched
from quantlab.evaluation.processes.messages import Progress, SpeedRequest, SpeedResult, TwinTimings
from quantlab.evaluation.suite import SpeedSuite, load_suite
from quantlab.files import read_json
from quantlab.formats.compressed_tensors import QuantizationConfig
from quantlab.formats.layouts import description_in
from quantlab.runtime.account import weight_bytes
from quantlab.runtime.cache import cached
from quantlab.runtime.decode import Decoder
from quantlab.runtime.native import library as native
from quantlab.runtime.twin import random_twin

LEAST_ROUNDS = 3
"""Of one process."""
_SEED = 0
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Layout:
    """What decides how fast an artifact is: artifacts with the same layout share a twin."""

    dtype: str
    quantization: QuantizationConfig | None


@dataclass(frozen=True)
class Task:
    """One thing that is timed: `tokens` new tokens for each of `batch` sequences, decoded one by one or read at once."""

    kind: Literal["decode", "prefill"]
    batch: int
    tokens: int


@dataclass(frozen=True)
class Twin:
    """A model ready to be timed, with a filled cache for every batch size."""

    model: PreTrainedModel
    decoders: Mapping[int, Decoder]
    name: str


FP16 = Layout("float16", None)


def measure_speed(request: SpeedRequest, progress: Progress) -> SpeedResult:
    """Time the layouts of all artifacts, interleaved.

    Raises:
        QuantlabError: the FP16 twin cannot be made, so no ratio can be taken.
    """
    suite = load_suite(request.suite).suite.speed
    assert suite is not None, "asked for by a suite that measures speed"
    layouts = {variant: layout_of(directory) for variant, directory in request.artifacts.items()}
    twins: dict[Layout, Twin] = {}
    reasons: dict[Layout, str] = {}
    distinct = list(dict.fromkeys([FP16, *layouts.values()]))
    for index, layout in enumerate(distinct):
        progress("building twins", index, len(distinct))
        try:
            twins[layout] = build(layout, suite, device=request.device)
        except (QuantlabError, RuntimeError, ValueError) as error:  # torch's own errors are of the last two kinds
            if layout == FP16:
                raise
            reasons[layout] = str(error)
    progress("building twins", len(distinct), len(distinct))
    device = next(twins[FP16].model.parameters()).device
    timings, others = watched(lambda: time_rounds(twins, suite, progress, seed=request.process), device)
    joules, others_of_energy = watched(lambda: read_energy(twins, suite, seed=request.process), device)
    return SpeedResult(
        computed_by=_computed_by(twins.values()),
        twins=tuple(
            TwinTimings(
                layout=twin.name,
                is_fp16=layout == FP16,
                variants=tuple(variant for variant, one in layouts.items() if one == layout),
                memory_percent_of_fp16=100 * held.total / held.fp16,
                rates={f"{task.kind}.{task.batch}": values for task, values in timings[layout].items()},
                joules=joules.get(layout, {}),
                not_fused=next(iter(twin.decoders.values())).not_fused,  # of the model: the same at every batch size
            )
            for layout, twin in twins.items()
            for held in [weight_bytes(twin.model)]
        ),
        failures={variant: reasons[layout] for variant, layout in layouts.items() if layout in reasons},
        others=others,
        others_of_energy=others_of_energy,
    )


def layout_of(directory: Path) -> Layout:
    """The layout of a checkpoint, from its config.json. FP8 blocks are expanded to bfloat16 when loaded.

    Raises:
        EvaluationError: the checkpoint is of a layout the runtime does not compute with.
    """
    config = read_json(directory / "config.json")
    description = description_in(config, where=str(directory / "config.json"))
    expanded = description is None or not any(number.is_integer for number in description.formats)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or ("float32" if description is None else "bfloat16"))
    if dtype in DTYPES and expanded:
        return Layout(dtype, None)
    if dtype in DTYPES and isinstance(description, QuantizationConfig):
        return Layout(dtype, description)
    raise EvaluationError(
        "the speed of this layout cannot be measured",
        where=str(directory / "config.json"),
        found=dtype if dtype not in DTYPES else str(config["quantization_config"]["quant_method"]),
        fix=f"use one of {', '.join(DTYPES)}, fp8 or compressed-tensors",
    )


def build(layout: Layout, suite: SpeedSuite, *, device: str = "cpu") -> Twin:
    """A twin with its caches filled, every kind of step having run once so that nothing is timed cold.

    All sequences of a batch share one context: what it holds does not change how long a step takes.

    Args:
        layout: of the weights.
        suite: the twin's shape, its batches and lengths.
        device: where it computes.
    """
    model = random_twin(suite.shape, layout.quantization, dtype=DTYPES[layout.dtype], seed=_SEED, device=device)
    prompt = DynamicCache(config=model.config)
    with torch.inference_mode():
        ids = _tokens(1, suite.prompt, int(model.config.vocab_size)).to(model.device)
        model(input_ids=ids, **cached(prompt), logits_to_keep=1)
    decoders: dict[int, Decoder] = {}
    for batch in suite.batches:
        decoders[batch] = Decoder(model, batch=batch, length=suite.prompt + suite.steps)
        decoders[batch].fill(prompt)
    twin = Twin(model, decoders, layout_name(layout, model))
    for batch in suite.batches:
        run_task(twin, Task("decode", batch, 1))
    for batch in set(suite.prefill_batches) - {1}:  # the prompt was read at 1
        run_task(twin, Task("prefill", batch, suite.prompt))
    return twin


def layout_name(layout: Layout, model: PreTrainedModel) -> str:
    """The layout for people: "bfloat16", "int4_g128 on 93 % of the weights, the rest float16"."""
    if layout.quantization is None:
        return layout.dtype
    counted = weight_bytes(model)
    share = 100 * counted.quantized_fp16 / counted.fp16
    schemes = " and ".join(number.name for number in layout.quantization.formats)
    return f"{schemes} on {share:.0f} % of the weights, the rest {layout.dtype}"


def tasks(suite: SpeedSuite) -> tuple[Task, ...]:
    """What one round times of each twin."""
    decode = (Task("decode", batch, suite.steps) for batch in suite.batches)
    return (*decode, *(Task("prefill", batch, suite.prompt) for batch in suite.prefill_batches))


def time_rounds(
    twins: Mapping[Layout, Twin], suite: SpeedSuite, progress: Progress, *, seed: int
) -> dict[Layout, dict[Task, tuple[float, ...]]]:
    """Tokens per second of every twin and task; entry i of all twins is from the same turn.

    In a round each task has a turn, and more of them if it is over soon: two steps at batch 1 are not enough to go by.
    """
    wanted = tasks(suite)
    rates: dict[Layout, dict[Task, tuple[float, ...]]] = {layout: dict.fromkeys(wanted, ()) for layout in twins}
    most, limit = -(-suite.rounds // suite.processes), suite.seconds / suite.processes
    generator = np.random.default_rng((_SEED, seed))
    order = list(twins)
    start = time.perf_counter()
    done = 0
    while done < LEAST_ROUNDS or (done < most and time.perf_counter() - start < limit):
        progress("timing rounds", done, most)
        for task in wanted:
            taken = 0.0
            while taken <= suite.task_seconds:
                for index in generator.permutation(len(order)):
                    seconds = run_task(twins[order[index]], task)
                    rates[order[index]][task] += (task.batch * task.tokens / seconds,)
                    taken += seconds
        done += 1
    progress("timing rounds", done, done)
    return rates


@torch.inference_mode()
def run_task(twin: Twin, task: Task) -> float:
    """Seconds one task takes. A decode starts from the same filled cache every time."""
    model = twin.model
    tokens = _tokens(task.batch, task.tokens, int(model.config.vocab_size)).to(model.device)
    if task.kind == "prefill":
        cache = DynamicCache(config=model.config)
        start = now(model.device)
        model(input_ids=tokens, **cached(cache), logits_to_keep=1)
        return now(model.device) - start
    decoder = twin.decoders[task.batch]
    start = now(model.device)
    for step in range(task.tokens):
        decoder.step(tokens[:, step])
    seconds = now(model.device) - start
    decoder.rewind(decoder.used - task.tokens)
    return seconds


def read_energy(
    twins: Mapping[Layout, Twin], suite: SpeedSuite, *, seed: int
) -> dict[Layout, dict[str, tuple[float, ...]]]:
    """Joules per decoded token by batch size, in stretches of steady decoding that take turns; empty where none are counted."""
    device = next(twins[FP16].model.parameters()).device
    joules = meter(device) if suite.energy_seconds else None
    if joules is None:
        return {}
    decodes = [task for task in tasks(suite) if task.kind == "decode"]
    found: dict[Layout, dict[str, tuple[float, ...]]] = {
        layout: {str(task.batch): () for task in decodes} for layout in twins
    }
    generator = np.random.default_rng((_SEED, seed))
    order = list(twins)
    stretch = suite.energy_seconds / suite.processes / LEAST_ROUNDS
    for _ in range(LEAST_ROUNDS):
        for task in decodes:
            for index in generator.permutation(len(order)):
                begin, start, tokens = joules(), now(device), 0
                while now(device) - start < stretch:
                    run_task(twins[order[index]], task)
                    tokens += task.batch * task.tokens
                found[order[index]][str(task.batch)] += ((joules() - begin) / tokens,)
    return found


def _computed_by(twins: Collection[Twin]) -> str:
    """The GPU and how it takes a step, or whose operators the processor runs; a way of all twins or of none."""
    device = next(iter(twins)).model.device
    decoders = [decoder for twin in twins for decoder in twin.decoders.values()]
    captured, fused = all(decoder.captures for decoder in decoders), all(decoder.fuses for decoder in decoders)
    if device.type != "cuda":
        return f"{native.status()}{', fused steps' if fused else ''}"
    how = f"{'captured' if captured else 'single'}{', fused' if fused else ''} steps"
    return f"{torch.cuda.get_device_name(device)}, {how}"


def _tokens(batch: int, length: int, vocabulary: int) -> Tensor:
    """Random token ids [batch, length], the same for every twin and round."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(vocabulary, (batch, length), generator=generator)
