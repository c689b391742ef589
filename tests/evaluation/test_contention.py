"""Contention is detected: another busy process, and rounds with a large spread."""

import multiprocessing
import os
import time

import numpy as np
import pytest
import torch

from quantlab.evaluation.machine import contention, time_and_memory
from quantlab.evaluation.machine.contention import ClockReading, cpu_contention, gpu_contention, rounds_spread


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_cpu_use_of_other_processes_is_reported() -> None:
    begin = ClockReading(wall=10.0, own=5.0, busy=100.0)
    assert (
        cpu_contention(begin, ClockReading(wall=20.0, own=24.0, busy=128.0), threads=2)
        == "other processes took 0.9 of 2 cores"
    )
    assert cpu_contention(begin, ClockReading(wall=20.0, own=24.0, busy=120.0), threads=2) is None


@pytest.mark.skipif(ClockReading.now().busy is None, reason="nobody counts processor time here")
def test_a_neighbour_is_seen_and_ones_own_work_is_not() -> None:
    """Tests the clocks, independent of the machine's load: `busy` includes the other process, `own` only this one."""
    begin = ClockReading.now()
    spin(0.4)
    middle = ClockReading.now()
    neighbour = multiprocessing.get_context("fork").Process(target=spin, args=(0.4,))
    neighbour.start()
    neighbour.join()
    end = ClockReading.now()
    assert middle.own - begin.own > 0.1
    assert middle.busy is not None
    assert begin.busy is not None
    assert end.busy is not None
    assert middle.busy - begin.busy > 0.1
    assert end.own - middle.own < 0.1
    assert end.busy - middle.busy > 0.1


def test_without_cpu_counters_the_load_average_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = ClockReading(0.0, 0.0, None)
    monkeypatch.setattr(contention.os, "getloadavg", lambda: (5.3, 0, 0))
    assert cpu_contention(quiet, quiet, threads=2) == "a load of 5.3 on 2 cores"
    monkeypatch.setattr(contention.os, "getloadavg", lambda: (2.1, 0, 0))
    assert cpu_contention(quiet, quiet, threads=2) is None
    assert os.getloadavg()[0] == 2.1


def test_rounds_that_disagree_are_noisy() -> None:
    assert rounds_spread(np.array([10.0, 10.1, 9.9, 10.2, 9.8, 10.0, 10.1])) is None
    assert (
        rounds_spread(np.array([10.0, 14.0, 7.0, 13.0, 8.0, 10.0, 15.0]))
        == "the middle half of its 7 rounds spreads over 45 % of the median"
    )


def test_a_gpu_that_others_keep_busy_is_told() -> None:
    assert gpu_contention(None) is None
    assert gpu_contention(3) is None
    assert gpu_contention(40) == "other processes kept the GPU busy for 40 % of the time"


def test_a_gpu_is_looked_at_while_nothing_of_ours_runs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    def told(what: str) -> None:
        happened.append(what)

    def read(device: torch.device) -> int:
        told("read")
        return 40 if happened.count("read") == 2 else 0

    monkeypatch.setattr(time_and_memory.torch.cuda, "synchronize", lambda device: told("done"))
    monkeypatch.setattr(time_and_memory.time, "sleep", lambda seconds: told(f"{seconds:g} s"))
    monkeypatch.setattr(time_and_memory, "utilization", read)
    monkeypatch.setattr(time_and_memory, "cpu_contention", lambda *_, **__: None)
    found, others = time_and_memory.with_contention(lambda: told("work"), torch.device("cuda"))
    assert found is None
    assert others == "other processes kept the GPU busy for 40 % of the time"
    assert happened == ["done", "1.2 s", "read", "work", "done", "1.2 s", "read"]
    happened.clear()
    assert time_and_memory.with_contention(lambda: 7, torch.device("cpu")) == (7, None)
    assert happened == []
