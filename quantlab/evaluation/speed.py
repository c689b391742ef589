"""Speed: every distinct layout of a recipe's artifacts, timed in one process on random-weight twins.

How long a step takes depends on shapes and layouts, not on what the weights are, so the twin has the width of the target
model, a few of its layers, and random weights in exactly the layout of the artifact. Machines drift: clocks, caches and
neighbours change within seconds. So all twins are alive at once, every round times each of them in a new random order,
and a ratio to the FP16 twin is taken within the round; its median over rounds is what the table shows.

On CUDA a decode step is captured as a graph and replayed, with a cache of fixed size, as serving engines do it.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from quantlab.checkpoint.index import read_json
from quantlab.errors import EvaluationError, QuantlabError
from quantlab.evaluation.contention import Moment, crowd, spread
from quantlab.evaluation.energy import meter
from quantlab.evaluation.gauges import now
from quantlab.evaluation.jobs import Progress, SpeedRequest, SpeedResult
from quantlab.evaluation.record import Measured, Speed
from quantlab.evaluation.statistics import Floats, median
from quantlab.evaluation.suite import SpeedSuite, load_suite
from quantlab.formats.compressed_tensors import QUANT_METHOD, QuantizationConfig, parse_config
from quantlab.runtime.account import weight_bytes
from quantlab.runtime.decode import Decoder
from quantlab.runtime.native import library as native
from quantlab.runtime.twin import random_twin

_LEAST_ROUNDS = 7
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
    """A model ready to be timed, with a filled cache for every batch size: one that grows, or one of fixed size."""

    model: PreTrainedModel
    caches: Mapping[int, DynamicCache | Decoder]
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
    begin = Moment.now()
    timings = time_rounds(twins, tasks(suite), suite, progress)
    others = crowd(begin, Moment.now(), threads=torch.get_num_threads())
    energies = {layout: energy_per_token(twin, suite) for layout, twin in twins.items()}
    speeds, failures = {}, {}
    for variant, layout in layouts.items():
        if layout in twins:
            sharing = [other for other in layouts if other != variant and layouts[other] == layout]
            summary = summarise(suite, twins[layout], timings[layout], timings[FP16], sharing=sharing, others=others)
            speeds[variant] = summary.model_copy(update={"energy_joules_per_token": energies[layout]})
        else:
            failures[variant] = reasons[layout]
    return SpeedResult(speeds=speeds, failures=failures)


def layout_of(directory: Path) -> Layout:
    """The layout of a checkpoint, from its config.json. FP8 blocks are expanded to bfloat16 when loaded.

    Raises:
        EvaluationError: the checkpoint is of a layout the runtime does not compute with.
    """
    config = read_json(directory / "config.json")
    described = config.get("quantization_config")
    if described is None or described.get("quant_method") == "fp8":
        dtype = "bfloat16" if described else str(config.get("dtype") or config.get("torch_dtype") or "float32")
        quantization = None
    elif described.get("quant_method") == QUANT_METHOD:
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        quantization = parse_config(described, where=str(directory / "config.json"))
    else:
        dtype, quantization = str(described.get("quant_method")), None
    if dtype not in DTYPES:
        raise EvaluationError(
            "the speed of this layout cannot be measured",
            where=str(directory / "config.json"),
            found=dtype,
            fix=f"use one of {', '.join(DTYPES)}, fp8 or {QUANT_METHOD}",
        )
    return Layout(dtype, quantization)


def build(layout: Layout, suite: SpeedSuite, *, device: str = "cpu", fixed: bool | None = None) -> Twin:
    """A twin with its caches filled, every kind of step having run once so that nothing is timed cold.

    All sequences of a batch share one context: what it holds does not change how long a step takes.

    Args:
        layout: of the weights.
        suite: the twin's shape, its batches and lengths.
        device: where it computes.
        fixed: whether it decodes from a cache of fixed size; None for yes on CUDA.
    """
    model = random_twin(suite.shape, layout.quantization, dtype=DTYPES[layout.dtype], seed=_SEED, device=device)
    prompt = _tokens(1, suite.prompt, int(model.config.vocab_size)).to(model.device)
    caches: dict[int, DynamicCache | Decoder] = {}
    if model.device.type == "cuda" if fixed is None else fixed:
        for batch in suite.batches:
            decoder = Decoder(model, batch=batch, length=suite.prompt + suite.steps)
            decoder.prefill(prompt.expand(batch, -1))
            caches[batch] = decoder
    else:
        filled = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(input_ids=prompt, past_key_values=filled, use_cache=True, logits_to_keep=1)
            for batch in suite.batches:
                grown = copy.deepcopy(filled)
                grown.batch_repeat_interleave(batch)
                caches[batch] = grown
    twin = Twin(model, caches, layout_name(layout, model))
    for task in tasks(suite):
        if task.kind == "decode":  # filling the cache was a prefill
            run_task(twin, task)
    return twin


def layout_name(layout: Layout, model: PreTrainedModel) -> str:
    """The layout for people: "bfloat16", "int4_g128 on 93 % of the weights, the rest float16"."""
    if layout.quantization is None:
        return layout.dtype
    counted = weight_bytes(model)
    share = 100 * counted.quantized_fp16 / counted.fp16
    schemes = " and ".join(dict.fromkeys(scheme.name for _, scheme in layout.quantization.groups))
    return f"{schemes} on {share:.0f} % of the weights, the rest {layout.dtype}"


def tasks(suite: SpeedSuite) -> tuple[Task, ...]:
    """What one round times of each twin."""
    decode = (Task("decode", batch, suite.steps) for batch in suite.batches)
    return (*decode, *(Task("prefill", batch, suite.prompt) for batch in suite.prefill_batches))


def time_rounds(
    twins: Mapping[Layout, Twin], wanted: Sequence[Task], suite: SpeedSuite, progress: Progress
) -> dict[Layout, dict[Task, Floats]]:
    """Tokens per second of every twin and task in each round [n]; entry i of all of them is from the same round."""
    rates: dict[Layout, dict[Task, list[float]]] = {layout: {task: [] for task in wanted} for layout in twins}
    generator = np.random.default_rng(_SEED)
    order = list(twins)
    start = time.perf_counter()
    done = 0
    while done < _LEAST_ROUNDS or (done < suite.rounds and time.perf_counter() - start < suite.seconds):
        progress("timing rounds", done, suite.rounds)
        for task in wanted:
            for index in generator.permutation(len(order)):
                seconds = run_task(twins[order[index]], task)
                rates[order[index]][task].append(task.batch * task.tokens / seconds)
        done += 1
    progress("timing rounds", done, done)
    return {layout: {task: np.array(values) for task, values in by_task.items()} for layout, by_task in rates.items()}


@torch.inference_mode()
def run_task(twin: Twin, task: Task) -> float:
    """Seconds one task takes. A decode starts from the same filled cache every time."""
    model = twin.model
    tokens = _tokens(task.batch, task.tokens, int(model.config.vocab_size)).to(model.device)
    if task.kind == "prefill":
        cache = DynamicCache(config=model.config)
        start = now(model.device)
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return now(model.device) - start
    context = twin.caches[task.batch]
    start = now(model.device)
    for step in range(task.tokens):
        if isinstance(context, Decoder):
            context.step(tokens[:, step])
        else:
            model(input_ids=tokens[:, step : step + 1], past_key_values=context, use_cache=True)
    seconds = now(model.device) - start
    if isinstance(context, Decoder):
        context.rewind(context.used - task.tokens)
    else:
        context.crop(-task.tokens)
    return seconds


def energy_per_token(twin: Twin, suite: SpeedSuite) -> dict[str, Measured] | None:
    """Joules per decoded token by batch size, in seven stretches of steady decoding; None where the device does not count them."""
    device = next(twin.model.parameters()).device
    joules = meter(device) if suite.energy_seconds else None
    if joules is None:
        return None
    found = {}
    for task in (task for task in tasks(suite) if task.kind == "decode"):
        stretches = []
        for _ in range(_LEAST_ROUNDS):
            begin, start, tokens = joules(), now(device), 0
            while now(device) - start < suite.energy_seconds / _LEAST_ROUNDS:
                run_task(twin, task)
                tokens += task.batch * task.tokens
            stretches.append((joules() - begin) / tokens)
        found[str(task.batch)] = median(np.array(stretches))
    return found


def summarise(
    suite: SpeedSuite,
    twin: Twin,
    rates: Mapping[Task, Floats],
    fp16: Mapping[Task, Floats],
    *,
    sharing: Sequence[str],
    others: str | None = None,
) -> Speed:
    """The record's numbers: medians over rounds, ratios within a round.

    Args:
        suite: what was asked for.
        twin: what was timed.
        rates: tokens per second of each task in each round.
        fp16: the same of the FP16 twin.
        sharing: variants with the same layout.
        others: what other processes did meanwhile, None if nothing that matters.
    """
    cells: dict[str, dict[str, Floats]] = {"decode_tokens_per_second": {}, "prefill_tokens_per_second": {}}
    cells |= {"decode_over_fp16": {}, "prefill_over_fp16": {}, "time_to_first_token_seconds": {}}
    for task, values in rates.items():
        cells[f"{task.kind}_tokens_per_second"][str(task.batch)] = values
        cells[f"{task.kind}_over_fp16"][str(task.batch)] = values / fp16[task]
        if task.kind == "prefill":
            cells["time_to_first_token_seconds"][str(task.batch)] = task.batch * task.tokens / values
    named = {f"{name}.{batch}": values for name, by_batch in cells.items() for batch, values in by_batch.items()}
    shared = f", timed once with {', '.join(sharing)}" if sharing else ""
    held = weight_bytes(twin.model)
    return Speed(
        twin=f"{suite.description}, {suite.prompt} tokens in the cache, {_computed_by(twin)}",
        layout=twin.name + shared,
        twin_memory_percent_of_fp16=100 * held.total / held.fp16,
        quartiles={
            cell: (float(np.quantile(values, 0.25)), float(np.quantile(values, 0.75))) for cell, values in named.items()
        },
        noise={cell: reason for cell, values in named.items() if (reason := others or spread(values))},
        **{name: {batch: median(values) for batch, values in by_batch.items()} for name, by_batch in cells.items()},
    )


def _computed_by(twin: Twin) -> str:
    device = next(twin.model.parameters()).device
    if device.type == "cuda":
        captured = all(isinstance(cache, Decoder) and cache.captures for cache in twin.caches.values())
        return f"{torch.cuda.get_device_name(device)}, {'captured' if captured else 'single'} steps"
    return native.status()


def _tokens(batch: int, length: int, vocabulary: int) -> Tensor:
    """Random token ids [batch, length], the same for every twin and round."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(vocabulary, (batch, length), generator=generator)
