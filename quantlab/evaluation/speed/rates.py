"""The speeds of a record, combined from the timings of several processes.

A ratio to FP16 is taken within a turn, in which the machine's state is the same for both. Its median over the turns of a process
is one observation, because processes differ by more than turns do. Needs no torch: the requesting process does not compute.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from quantlab.evaluation.machine.contention import rounds_spread
from quantlab.evaluation.measured import Measured
from quantlab.evaluation.processes.messages import ModelTimings, SpeedResult
from quantlab.evaluation.speed.metrics import Speed
from quantlab.evaluation.statistics import Floats, ProcessVariation, over_processes, process_variation
from quantlab.evaluation.suite import SpeedSuite

Values = list[Floats]
"""The values of one cell in each process."""

_INDEPENDENT: Final = {"tokens_per_second": 1.0, "over_fp16": 2.0, "energy": 1.0}
"""Kinds of numbers whose variation between processes is pooled over the models, each with the maximum effective number of
independent models (`statistics.process_variation`). All rates of a process share its clock, so three processes give only a range.
Ratios share the FP16 model, and some models vary more than others. Check: among 16 processes of the suite `quick`, intervals from
three random processes contained the mean of three others in 93 % of the draws.
"""
_EXACT: Final = 1000


def speeds_of(suite: SpeedSuite, results: Sequence[SpeedResult]) -> dict[str, Speed]:
    """The speed of every variant that every process could time.

    Args:
        suite: the suite's section on speed.
        results: results of each process.
    """
    references = [next(timing for timing in result.timings if timing.is_fp16) for result in results]
    shared = [timings for timing in results[0].timings if len(timings := _same(timing, results)) == len(results)]
    cells = [_cells(suite, timings, references) for timings in shared]
    return {
        variant: _speed(suite, variant, results, timings[0], values, measured)
        for timings, values, measured in zip(shared, cells, _measured(cells), strict=True)
        for variant in timings[0].variants
    }


def _same(timing: ModelTimings, results: Sequence[SpeedResult]) -> list[ModelTimings]:
    """The timings of the same model in every process that timed it."""
    return [
        one
        for result in results
        for one in result.timings
        if (one.layout, one.variants) == (timing.layout, timing.variants)
    ]


def _cells(suite: SpeedSuite, timings: Sequence[ModelTimings], references: Sequence[ModelTimings]) -> dict[str, Values]:
    """Cell ("decode_over_fp16.1") -> its values in each process."""
    found: dict[str, Values] = {}
    for name in timings[0].rates:
        kind, _, batch = name.partition(".")
        rates = [np.array(timing.rates[name]) for timing in timings]
        found[f"{kind}_tokens_per_second.{batch}"] = rates
        found[f"{kind}_over_fp16.{batch}"] = [
            values / np.array(reference.rates[name]) for values, reference in zip(rates, references, strict=True)
        ]
        if kind == "prefill":
            found[f"time_to_first_token_seconds.{batch}"] = [int(batch) * suite.prompt / values for values in rates]
    for batch in timings[0].joules:
        found[f"energy_joules_per_token.{batch}"] = [np.array(timing.joules[batch]) for timing in timings]
    return found


def _measured(cells: Sequence[Mapping[str, Values]]) -> list[dict[str, Measured]]:
    """Every cell of every model with its interval. FP16 over itself is exactly 1 in every process."""
    found: list[dict[str, Measured]] = [{} for _ in cells]
    for mark, independent in _INDEPENDENT.items():
        for name in [name for name in cells[0] if mark in name]:
            medians = np.array([[np.median(one) for one in values[name]] for values in cells])
            varying = medians[(medians != 1).any(axis=1)]
            # models of equal variance with correlation 1/2: F. E. Satterthwaite 1946
            effective = 4 * len(varying) / (len(varying) + 3)
            pooled = (
                process_variation(varying, independent=min(independent, effective))
                if len(varying)
                else ProcessVariation(0.0, _EXACT)
            )
            for at, values in enumerate(cells):
                exact = "over_fp16" in name and all((one == 1).all() for one in values[name])
                found[at][name] = over_processes(values[name], ProcessVariation(0.0, _EXACT) if exact else pooled)
    return found


def _speed(
    suite: SpeedSuite,
    variant: str,
    results: Sequence[SpeedResult],
    timing: ModelTimings,
    cells: Mapping[str, Values],
    measured: Mapping[str, Measured],
) -> Speed:
    others = next((result.others for result in results if result.others), None)
    of_energy = next((result.others_of_energy for result in results if result.others_of_energy), None)
    together = {name: np.concatenate(values) for name, values in cells.items()}
    noise = {
        name: reason
        for name, values in together.items()
        if (reason := (of_energy if name.startswith("energy") else others) or rounds_spread(values))
    }

    def by_batch(kind: str) -> dict[str, Measured]:
        return {name.partition(".")[2]: one for name, one in measured.items() if name.partition(".")[0] == kind}

    return Speed(
        timed=results[0].timed,
        twin=f"{results[0].model}, {suite.prompt} tokens in the cache, {results[0].computed_by}",
        layout=timing.layout,
        timed_with=tuple(other for other in timing.variants if other != variant),
        twin_memory_percent_of_fp16=None if results[0].timed == "artifact" else timing.memory_percent_of_fp16,
        processes=len(results),
        decode_tokens_per_second=by_batch("decode_tokens_per_second"),
        prefill_tokens_per_second=by_batch("prefill_tokens_per_second"),
        decode_over_fp16=by_batch("decode_over_fp16"),
        prefill_over_fp16=by_batch("prefill_over_fp16"),
        time_to_first_token_seconds={
            batch: _seconds(int(batch) * suite.prompt, rate)
            for batch, rate in by_batch("prefill_tokens_per_second").items()
        },
        energy_joules_per_token=by_batch("energy_joules_per_token") or None,
        quartiles={
            name: (float(np.quantile(values, 0.25)), float(np.quantile(values, 0.75)))
            for name, values in together.items()
        },
        not_fused=timing.not_fused or "",
        noise=noise,
    )


def _seconds(tokens: int, rate: Measured) -> Measured:
    """Seconds for `tokens` tokens at a rate."""
    return rate.model_copy(update={"value": tokens / rate.value, "low": tokens / rate.high, "high": tokens / rate.low})
