"""Speed: artifacts of one layout share a timing, and ratios are taken within rounds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantlab.errors import CheckpointError
from quantlab.evaluation.machine import energy
from quantlab.evaluation.processes.messages import ModelTimings, SpeedRequest, SpeedResult
from quantlab.evaluation.speed import models
from quantlab.evaluation.speed.measure import (
    Task,
    TimedModel,
    measure_speed,
    prepare,
    read_energy,
    run_task,
    tasks,
    time_rounds,
)
from quantlab.evaluation.speed.models import Layout, ModelBuilder, layout_name, layout_of
from quantlab.evaluation.speed.own_layers import own_layers
from quantlab.evaluation.speed.rates import speeds_of
from quantlab.evaluation.suite import SpeedSuite, load_suite
from quantlab.exports.export import export
from quantlab.formats.compressed_tensors import Group, QuantizationConfig
from quantlab.recipe.schemes import SCHEMES
from quantlab.runtime.modules.linear import PackedLinear
from quantlab.runtime.twin import random_twin
from tests.checkpoints import FP8, all_linears
from tests.exports.artifacts import make_artifact
from tests.runtime.tiny import FAMILIES, quantize, write_checkpoint

FP16 = Layout("float16", None)
INT4 = all_linears(SCHEMES["int4_g128"], ("lm_head", "re:.*kv_b_proj$", "re:.*mlp\\.gate$"))


def build(layout: Layout, suite: SpeedSuite) -> TimedModel:
    """A twin of the suite's shape."""
    model = ModelBuilder("twin", suite.description, suite.shape).build(layout, Path(), device="cpu")
    return prepare(model, suite, layout_name(layout, model))


def write_config(directory: Path, **fields: object) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "deepseek_v2", **fields}))
    return directory


@pytest.mark.parametrize(
    ("fields", "layout"),
    [
        ({"torch_dtype": "float16"}, FP16),
        ({"dtype": "bfloat16"}, Layout("bfloat16", None)),
        ({"torch_dtype": "bfloat16", "quantization_config": FP8}, Layout("bfloat16", None)),
        ({"dtype": "bfloat16", "quantization_config": INT4.to_json()}, Layout("bfloat16", INT4)),
    ],
)
def test_the_layout_follows_from_the_config(tmp_path: Path, fields: dict[str, object], layout: Layout) -> None:
    assert layout_of(write_config(tmp_path / "artifact", **fields)) == layout


def test_a_layout_nobody_computes_with_is_an_error(tmp_path: Path) -> None:
    directory = write_config(tmp_path / "awq", quantization_config={"quant_method": "awq"})
    with pytest.raises(CheckpointError, match=r"does not read[^$]*awq"):
        layout_of(directory)


def test_a_layout_of_gptq_is_that_of_the_same_formats(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """The formats that GPTQ's tensors state, of every linear: the runtime holds them as those of compressed-tensors."""
    artifact = make_artifact(checkpoints["deepseek_v2"], "[{quantize: int4_g64, targets: [routed_experts]}]", tmp_path)
    export(artifact, "gptq", tmp_path / "gptq", lambda _: None)
    assert layout_of(tmp_path / "gptq") == layout_of(artifact)


def test_artifacts_of_one_layout_share_a_twin_and_a_bad_one_fails_alone(tmp_path: Path, suite: Path) -> None:
    int8, weight = SCHEMES["int8"], SCHEMES["int8_weight"]
    odd = QuantizationConfig(
        (
            Group(("re:.*experts.*",), weight.format, weight.layout),
            Group(("re:.*experts\\.0\\..*",), int8.format, int8.layout),
        ),
        (),
    )
    mixed = odd.to_json()
    mixed["config_groups"]["group_0"]["targets"] = ["re:.*experts\\.[1-9]\\..*"]
    levels = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    artifacts = {
        "fp16": write_config(tmp_path / "fp16", dtype="float16"),
        "pruned": write_config(tmp_path / "pruned", dtype="float16"),
        "w4a16": write_config(tmp_path / "w4a16", dtype="bfloat16", quantization_config=INT4.to_json()),
        "mixed": write_config(tmp_path / "mixed", dtype="bfloat16", quantization_config=mixed),
        "levels": write_config(tmp_path / "levels", dtype="bfloat16", quantization_config=levels),
    }
    stages = []
    results = [
        measure_speed(
            SpeedRequest(suite=suite, artifacts=artifacts, source=artifacts["fp16"], process=process),
            lambda *stage: stages.append(stage),
        )
        for process in range(3)
    ]
    assert all("different number formats" in result.failures["mixed"] for result in results)
    assert all("nf4_g64, which the runtime expands" in result.failures["levels"] for result in results)
    assert all(SpeedResult.model_validate_json(result.model_dump_json()) == result for result in results)
    speed = load_suite(suite).suite.speed
    assert speed is not None
    speeds = speeds_of(speed, results)
    assert set(speeds) == {"fp16", "pruned", "w4a16"}
    fp16, pruned, w4a16 = (speeds[name] for name in ("fp16", "pruned", "w4a16"))
    assert fp16.twin.startswith("a twin of nothing, ")
    assert (fp16.layout, fp16.timed_with) == ("float16", ("pruned",))
    assert fp16.decode_tokens_per_second == pruned.decode_tokens_per_second
    assert "int4_g128 on" in w4a16.layout
    assert set(w4a16.decode_tokens_per_second) == {"1", "2"}
    assert set(w4a16.prefill_over_fp16) == {"1"}
    ratio = w4a16.decode_over_fp16["2"]
    assert (ratio.n, ratio.interval, w4a16.processes) == (12, "range", 3), "one twin beside FP16 does not tell enough"
    assert ratio.low < ratio.value < ratio.high
    one = fp16.decode_over_fp16["1"]
    assert (one.value, one.low, one.high) == (1, 1, 1)
    assert ("timing rounds", 4, 4) in stages


OWN = """
name: own
version: 1
text: {corpus: heldout.jsonl, length: 24, tokens_per_domain: 600}
speed: {batches: [1], prompt: 4, steps: 2, processes: 2, rounds: 6, task_seconds: 0}
"""


@pytest.fixture
def own_suite(suite: Path) -> Path:
    """A suite that does not fix a shape."""
    suite.write_text(OWN)
    return suite


def asked(suite: Path, source: Path, artifact: Path, **named: Any) -> SpeedRequest:
    return SpeedRequest(suite=suite, artifacts={"source": source, "w4a16": artifact}, source=source, **named)


def test_artifacts_are_timed_whole_where_all_fit(own_suite: Path, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "deepseek_v3", num_hidden_layers=4)
    artifact = quantize(source, tmp_path / "w4a16", SCHEMES["int4_g128"]).directory
    result = measure_speed(asked(own_suite, source, artifact), lambda *_: None)
    assert (result.timed, result.model) == ("artifact", "the whole artifacts")
    assert [(timed_model.layout.partition(" ")[0], timed_model.variants) for timed_model in result.timings] == [
        ("float16", ()),
        ("bfloat16", ("source",)),
        ("int4_g128", ("w4a16",)),
    ]
    assert result.failures == {}
    speed = load_suite(own_suite).suite.speed
    assert speed is not None
    found = speeds_of(speed, [result, result])["w4a16"]
    assert found.timed == "artifact"
    assert found.twin_memory_percent_of_fp16 is None, "the memory of the artifact has a column of its own"


def test_a_large_model_is_timed_on_its_own_layers_and_so_is_fp16(
    own_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantlab.evaluation.speed.models.free_bytes", lambda _: 1000)
    shape = {"num_hidden_layers": 6, "first_k_dense_replace": 3, "vocab_size": 960}
    source = write_checkpoint(tmp_path / "source", "deepseek_v3", **shape)
    artifact = quantize(source, tmp_path / "w4a16", SCHEMES["int4_g128"]).directory
    made = []
    twin_of = models.random_twin

    def watched(config: Any, *given: Any, **named: Any) -> Any:
        made.append(twin_of(config, *given, **named))
        return made[-1]

    monkeypatch.setattr(models, "random_twin", watched)
    result = measure_speed(asked(own_suite, source, artifact), lambda *_: None)
    assert result.timed == "own layers"
    assert result.model.startswith("own layers (1 of 3 dense + 1 of 3 MoE), vocabulary cut from 960 to 320")
    assert len(made) == 3
    for model in made:
        kinds = [hasattr(layer.mlp, "experts") for layer in model.model.layers]
        assert kinds == [False, True]
        assert model.config.vocab_size == 320
        assert model.config.hidden_size == 128
    assert made[0].dtype == torch.float16
    # the other processes receive the choice of the first one
    monkeypatch.setattr("quantlab.evaluation.speed.models.free_bytes", lambda _: None)
    assert measure_speed(asked(own_suite, source, artifact, timed="own layers"), lambda *_: None).timed == "own layers"


@pytest.mark.parametrize(
    ("family", "changes", "layers", "fields"),
    [
        ("llama", {"num_hidden_layers": 32, "vocab_size": 102400}, (0,), {"num_hidden_layers": 1, "vocab_size": 3200}),
        (
            "deepseek_v3",
            {"num_hidden_layers": 61, "first_k_dense_replace": 3, "vocab_size": 129280},
            (0, 3),
            {"num_hidden_layers": 2, "first_k_dense_replace": 1, "vocab_size": 4224},
        ),
        (
            "deepseek_v2",
            {"num_hidden_layers": 4, "first_k_dense_replace": 0, "vocab_size": 256},
            (0,),
            {"vocab_size": 64},
        ),
    ],
)
def test_own_layers_are_one_of_each_kind_with_the_heads_share(
    family: str, changes: dict[str, int], layers: tuple[int, ...], fields: dict[str, int]
) -> None:
    found = own_layers({"model_type": family, **FAMILIES[family], **changes})
    assert found.layers == layers
    assert {name: found.config[name] for name in fields} == fields


def test_a_layer_of_a_twin_has_the_scheme_of_the_layer_it_stands_for(tmp_path: Path) -> None:
    ignored = ("lm_head", "re:.*kv_b_proj$", "re:.*mlp\\.gate$", r"re:.*layers\.3\.self_attn\..*")
    config = {
        "model_type": "deepseek_v3",
        **FAMILIES["deepseek_v3"],
        "num_hidden_layers": 6,
        "first_k_dense_replace": 3,
    }
    own = own_layers(config)
    quantization = all_linears(SCHEMES["int4_g128"], ignored)
    model = random_twin(own.config, quantization, dtype=torch.bfloat16, seed=0, layers=own.layers)
    held = [isinstance(layer.self_attn.o_proj, PackedLinear) for layer in model.model.layers]
    assert held == [True, False]


def test_every_round_starts_from_the_same_context(suite: Path) -> None:
    speed = load_suite(suite).suite.speed
    assert speed is not None
    timed_model = build(FP16, speed)
    for task in tasks(speed):
        assert run_task(timed_model, task) > 0
    assert {batch: decoder.used for batch, decoder in timed_model.decoders.items()} == {
        1: speed.prompt,
        2: speed.prompt,
    }


def timings(
    rates: dict[str, np.ndarray], fp16: dict[str, np.ndarray], *, joules: dict[str, np.ndarray] | None = None
) -> SpeedResult:
    """The result of a process that timed the FP16 twin and another twin."""

    def plain(values: dict[str, np.ndarray]) -> dict[str, tuple[float, ...]]:
        return {name: tuple(one.tolist()) for name, one in values.items()}

    shared, drawn = {"memory_percent_of_fp16": 30.0}, plain(joules or {})
    one = ModelTimings(layout="float16", is_fp16=True, variants=("fp16",), rates=plain(fp16), joules=drawn, **shared)
    other = ModelTimings(
        layout="int8",
        is_fp16=False,
        variants=("int8", "also"),
        rates=plain(rates),
        joules=plain(joules or {}),
        **shared,
    )
    return SpeedResult(
        timed="twin",
        model="a twin of nothing",
        computed_by="a processor",
        timings=(one, other),
        failures={},
        others=None,
        others_of_energy=None,
    )


def test_ratios_are_taken_within_a_round(suite: Path) -> None:
    speed = load_suite(suite).suite.speed
    assert speed is not None
    drift = np.array([1.0, 5, 2, 9, 4, 3, 8])  # drift of the machine, equal for both
    names = ("decode.1", "decode.2", "prefill.1")
    result = timings(dict.fromkeys(names, 3 * drift), dict.fromkeys(names, drift))
    found = speeds_of(speed, [result, result])["int8"]
    ratio = found.decode_over_fp16["1"]
    assert (ratio.value, ratio.low, ratio.high, ratio.n) == (pytest.approx(3), pytest.approx(3), pytest.approx(3), 14)
    assert found.twin == "a twin of nothing, 4 tokens in the cache, a processor"
    assert (found.layout, found.timed_with, found.twin_memory_percent_of_fp16) == ("int8", ("also",), 30)
    assert found.not_fused == "", "its steps were fused"


def test_a_record_says_why_steps_were_not_fused(suite: Path) -> None:
    speed = load_suite(suite).suite.speed
    assert speed is not None
    names = ("decode.1", "decode.2", "prefill.1")
    result = timings(dict.fromkeys(names, np.ones(3)), dict.fromkeys(names, np.ones(3)))
    plain = result.timings[1].model_copy(update={"not_fused": "there is a part nobody knows"})
    found = speeds_of(speed, [result.model_copy(update={"timings": (result.timings[0], plain)})])
    assert found["int8"].not_fused == "there is a part nobody knows"
    assert found["fp16"].not_fused == ""


def test_variation_between_processes_widens_every_interval(suite: Path) -> None:
    """Agreement of the rounds within each process does not predict the next process."""
    speed = load_suite(suite).suite.speed
    assert speed is not None
    names, fp16 = ("decode.1", "decode.2", "prefill.1"), np.full(5, 10.0)
    three = [
        timings({name: np.full(5, rate) for name in names}, dict.fromkeys(names, fp16)) for rate in (20.0, 22.0, 24.2)
    ]
    alone = speeds_of(speed, three)["int8"].decode_over_fp16["1"]
    assert (alone.low, alone.high, alone.interval, alone.reason) == (2.0, 2.42, "range", "3 processes")
    more = [
        one.model_copy(
            update={
                "timings": (
                    *one.timings,
                    *(one.timings[1].model_copy(update={"layout": n, "variants": (n,)}) for n in ("b", "c")),
                )
            }
        )
        for one in three
    ]
    found = speeds_of(speed, more)["int8"]
    ratio = found.decode_over_fp16["1"]
    assert (ratio.value, ratio.interval) == (pytest.approx(2.2), "95 %")
    # Student's t with 2 x 2 degrees of freedom, to predict three processes from three
    width = 2.776 * np.log(1.1) * np.sqrt(2 / 3)
    assert np.log(ratio.high / ratio.value) == pytest.approx(width, rel=0.02)
    assert np.log(ratio.value / ratio.low) == pytest.approx(width, rel=0.02)
    rate = found.decode_tokens_per_second["1"]
    assert (rate.low, rate.high, rate.interval, rate.reason) == (20.0, 24.2, "range", "3 processes")
    untold = speeds_of(speed, more[:2])["int8"].decode_over_fp16["1"]
    assert (untold.low, untold.high, untold.interval, untold.reason) == (2.0, 2.2, "range", "2 processes")


def test_short_tasks_get_several_turns(suite: Path) -> None:
    speed = load_suite(suite).suite.speed
    assert speed is not None
    speed = speed.model_copy(update={"task_seconds": 0.05})
    timed_models = {FP16: build(FP16, speed)}
    turns = [len(rates) for rates in time_rounds(timed_models, speed, lambda *_: None, seed=0)[FP16].values()]
    assert min(turns) > 4, "as many rounds, and in each of them more turns"


def test_cells_taken_among_strangers_or_that_disagree_are_marked(suite: Path) -> None:
    speed = load_suite(suite).suite.speed
    assert speed is not None
    steady, wild = np.linspace(9.9, 10.1, 7), np.array([5.0, 15, 10, 4, 16, 10, 10])
    rates = {"decode.1": steady, "prefill.1": wild}
    result = timings(rates, rates, joules={"1": steady, "2": wild})
    quiet = speeds_of(speed, [result, result])["int8"]
    assert set(quiet.noise) == {
        "prefill_tokens_per_second.1", "time_to_first_token_seconds.1", "energy_joules_per_token.2"
    }  # fmt: skip
    assert quiet.quartiles["decode_tokens_per_second.1"] == pytest.approx((9.9, 10.1), abs=0.06)
    assert quiet.time_to_first_token_seconds["1"].value == pytest.approx(4 / 10)
    uncounted = timings(rates, rates)
    assert speeds_of(speed, [uncounted, uncounted])["int8"].energy_joules_per_token is None
    assert quiet.energy_joules_per_token is not None
    assert quiet.energy_joules_per_token["1"].value == pytest.approx(10)
    crowded = result.model_copy(update={"others": "other processes took 0.9 of 2 cores"})
    noisy = speeds_of(speed, [result, crowded])["int8"].noise
    assert set(noisy) == set(quiet.quartiles) - {"energy_joules_per_token.1"}
    drained = result.model_copy(update={"others_of_energy": "other processes kept the GPU busy for 40 % of the time"})
    noisy = speeds_of(speed, [drained, result])["int8"].noise
    assert set(noisy) == {*quiet.noise, "energy_joules_per_token.1"}


def test_energy_is_read_around_steady_decoding_by_turns(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = load_suite(suite).suite.speed
    assert speed is not None
    other = Layout("bfloat16", None)
    timed_models = {FP16: build(FP16, speed), other: build(other, speed)}
    assert read_energy(timed_models, speed, seed=0) == {}
    asked = speed.model_copy(update={"energy_seconds": 0.07})
    monkeypatch.setattr("quantlab.evaluation.speed.measure.meter", lambda device: None)
    assert read_energy(timed_models, asked, seed=0) == {}
    joules, turns = 0.0, []

    def counted(timed_model: TimedModel, task: Task) -> None:
        nonlocal joules
        joules += task.batch * task.tokens * (2.0 if timed_model is timed_models[other] else 0.5)
        if turns[-1:] != [(timed_model.name, task.batch)]:
            turns.append((timed_model.name, task.batch))

    monkeypatch.setattr("quantlab.evaluation.speed.measure.run_task", counted)
    monkeypatch.setattr("quantlab.evaluation.speed.measure.meter", lambda device: lambda: 7.0 + joules)
    found = read_energy(timed_models, asked, seed=0)
    for layout, expected in ((FP16, 0.5), (other, 2.0)):
        assert set(found[layout]) == {"1", "2"}
        assert [len(values) for values in found[layout].values()] == [3, 3]
        assert np.array(list(found[layout].values())) == pytest.approx(expected)
    # both models decode a batch size before the next one, and no model has all its intervals in a row
    assert [{name for name, _ in turns[at : at + 2]} for at in range(0, 12, 2)] == [{"float16", "bfloat16"}] * 6


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
