"""Timing on a GPU: captured launches over rotating operands, interleaved candidates, medians."""

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

Calls = Sequence[Callable[[], object]]
_LEAST_LAUNCHES = 16


def captured(calls: Calls) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of every call, repeated to at least `_LEAST_LAUNCHES` calls, and their number."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    rounds = max(1, -(-_LEAST_LAUNCHES // len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    return graph, rounds * len(calls)


def interleaved(sides: Mapping[str, Calls], *, rounds: int = 15) -> dict[str, float]:
    """Median microseconds per call of each candidate; in every round each candidate runs once."""
    graphs = {name: captured(calls) for name, calls in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (graph, launches) in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop) * 1e3 / launches)
    return {name: statistics.median(values) for name, values in times.items()}


def copy_rate() -> float:
    """Terabytes per second of a copy on the device, counting bytes read and written."""
    source = torch.empty(1 << 29, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    microseconds = interleaved({"copy": [lambda: target.copy_(source)]}, rounds=5)["copy"]
    return 2 * source.nbytes / microseconds / 1e6


def hardware() -> str:
    """The GPU, and the versions of torch and triton."""
    import triton

    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
