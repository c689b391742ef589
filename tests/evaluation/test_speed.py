"""Speed: which artifacts share a twin, and that ratios are taken within rounds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from quantlab.errors import EvaluationError
from quantlab.evaluation import energy
from quantlab.evaluation.jobs import SpeedRequest
from quantlab.evaluation.speed import (
    FP16,
    Layout,
    Task,
    Twin,
    build,
    energy_per_token,
    layout_of,
    measure_speed,
    run_task,
    summarise,
    tasks,
)
from quantlab.evaluation.suite import load_suite
from quantlab.formats.compressed_tensors import QuantizationConfig
from quantlab.recipe.schemes import SCHEMES
from quantlab.runtime.decode import Decoder

INT4 = QuantizationConfig(((("Linear",), SCHEMES["int4_g128"]),), ("lm_head", "re:.*kv_b_proj$", "re:.*mlp\\.gate$"))


def write_config(directory: Path, **fields: object) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "deepseek_v2", **fields}))
    return directory


@pytest.mark.parametrize(
    ("fields", "layout"),
    [
        ({"torch_dtype": "float16"}, FP16),
        ({"dtype": "bfloat16"}, Layout("bfloat16", None)),
        ({"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}, Layout("bfloat16", None)),
        ({"dtype": "bfloat16", "quantization_config": INT4.to_json()}, Layout("bfloat16", INT4)),
    ],
)
def test_the_layout_follows_from_the_config(tmp_path: Path, fields: dict[str, object], layout: Layout) -> None:
    assert layout_of(write_config(tmp_path / "artifact", **fields)) == layout


def test_a_layout_nobody_computes_with_is_an_error(tmp_path: Path) -> None:
    directory = write_config(tmp_path / "artifact", quantization_config={"quant_method": "awq"})
    with pytest.raises(EvaluationError, match="cannot be measured"):
        layout_of(directory)


def test_artifacts_of_one_layout_share_a_twin_and_a_bad_one_fails_alone(tmp_path: Path, suite: Path) -> None:
    odd = QuantizationConfig(
        ((("re:.*experts.*",), SCHEMES["int8_weight"]), (("re:.*experts\\.0\\..*",), SCHEMES["int8"])), ()
    )
    mixed = odd.to_json()
    mixed["config_groups"]["group_0"]["targets"] = ["re:.*experts\\.[1-9]\\..*"]
    artifacts = {
        "fp16": write_config(tmp_path / "fp16", dtype="float16"),
        "pruned": write_config(tmp_path / "pruned", dtype="float16"),
        "w4a16": write_config(tmp_path / "w4a16", dtype="bfloat16", quantization_config=INT4.to_json()),
        "mixed": write_config(tmp_path / "mixed", dtype="bfloat16", quantization_config=mixed),
    }
    stages = []
    result = measure_speed(SpeedRequest(suite=suite, artifacts=artifacts), lambda *stage: stages.append(stage))
    assert set(result.speeds) == {"fp16", "pruned", "w4a16"}
    assert "quantized in different ways" in result.failures["mixed"]
    fp16, pruned, w4a16 = (result.speeds[name] for name in ("fp16", "pruned", "w4a16"))
    assert fp16.twin.startswith("a twin of nothing, ")
    assert fp16.layout == "float16, timed once with pruned"
    assert fp16.decode_tokens_per_second == pruned.decode_tokens_per_second
    assert "int4_g128 on" in w4a16.layout
    assert set(w4a16.decode_tokens_per_second) == {"1", "2"}
    assert set(w4a16.prefill_over_fp16) == {"1"}
    assert w4a16.decode_over_fp16["2"].n == 7
    one = fp16.decode_over_fp16["1"]
    assert (one.value, one.low, one.high) == (1, 1, 1)
    assert ("timing rounds", 7, 7) in stages


@pytest.mark.parametrize("fixed", [None, True])
def test_every_round_starts_from_the_same_context(suite: Path, fixed: bool | None) -> None:
    speed = load_suite(suite).suite.speed
    assert speed is not None
    twin = build(FP16, speed, fixed=fixed)
    for task in tasks(speed):
        assert run_task(twin, task) > 0
    used = {
        batch: cache.used if isinstance(cache, Decoder) else cache.get_seq_length()
        for batch, cache in twin.caches.items()
    }
    assert used == {1: speed.prompt, 2: speed.prompt}
    assert all(isinstance(cache, Decoder) == bool(fixed) for cache in twin.caches.values())


def test_ratios_are_taken_within_a_round(suite: Path) -> None:
    speed = load_suite(suite).suite.speed
    assert speed is not None
    drift = np.array([1.0, 5, 2, 9, 4, 3, 8])  # the machine's, the same for both
    task = Task("decode", 1, 2)
    twin = Twin(torch.nn.Linear(2, 2), {}, "float32")  # type: ignore[arg-type]
    summary = summarise(speed, twin, {task: 3 * drift}, {task: drift}, sharing=[])
    ratio = summary.decode_over_fp16["1"]
    assert (ratio.value, ratio.low, ratio.high) == (3, 3, 3)
    assert summary.twin_memory_percent_of_fp16 == 200
    assert summary.decode_tokens_per_second["1"].high > 3 * summary.decode_tokens_per_second["1"].low


def test_cells_taken_among_strangers_or_that_disagree_are_marked(suite: Path) -> None:
    speed = load_suite(suite).suite.speed
    assert speed is not None
    twin = build(FP16, speed)
    decode, prefill = Task("decode", 1, 2), Task("prefill", 1, 4)
    steady, wild = np.linspace(9.9, 10.1, 7), np.array([5.0, 15, 10, 4, 16, 10, 10])
    rates = {decode: steady, prefill: wild}
    quiet = summarise(speed, twin, rates, rates, sharing=[])
    assert set(quiet.noise) == {"prefill_tokens_per_second.1", "time_to_first_token_seconds.1"}
    assert quiet.quartiles["decode_tokens_per_second.1"] == pytest.approx((9.95, 10.05))
    assert quiet.time_to_first_token_seconds["1"].value == pytest.approx(4 / 10)
    assert quiet.energy_joules_per_token is None
    crowded = summarise(speed, twin, rates, rates, sharing=[], others="other processes took 0.9 of 2 cores")
    assert set(crowded.noise) == set(crowded.quartiles)
    assert len(crowded.noise) == 5


def test_energy_is_read_around_steady_decoding(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = load_suite(suite).suite.speed
    assert speed is not None
    twin = build(FP16, speed)
    assert energy_per_token(twin, speed) is None
    asked = speed.model_copy(update={"energy_seconds": 0.07})
    monkeypatch.setattr("quantlab.evaluation.speed.meter", lambda device: None)
    assert energy_per_token(twin, asked) is None
    decoded = 0

    def counted(_: Twin, task: Task) -> None:
        nonlocal decoded
        decoded += task.batch * task.tokens

    monkeypatch.setattr("quantlab.evaluation.speed.run_task", counted)
    monkeypatch.setattr("quantlab.evaluation.speed.meter", lambda device: lambda: 7.0 + 0.5 * decoded)
    found = energy_per_token(twin, asked)
    assert found is not None
    assert set(found) == {"1", "2"}
    assert found["1"].value == found["2"].value == pytest.approx(0.5)
    assert found["1"].n == 7


def test_rapl_counters_may_wrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "_RAPL", tmp_path)
    cpu = torch.device("cpu")
    assert energy.meter(cpu) is None
    for name, value in (("intel-rapl:0", 900_000), ("intel-rapl:0:0", 5), ("intel-rapl:1", 100_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000000\n")
    joules = energy.meter(cpu)
    assert joules is not None
    assert joules() == 0
    (tmp_path / "intel-rapl:0/energy_uj").write_text("200000\n")
    (tmp_path / "intel-rapl:1/energy_uj").write_text("150000\n")
    assert joules() == pytest.approx(0.35)
    assert joules() == pytest.approx(0.35)
