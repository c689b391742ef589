"""Statistics of dense input sites against all inputs of the whole model."""

from pathlib import Path

import pytest
import torch

from quantlab.calibration.collect import Stream, advance, collect, keep_last_inputs, record
from quantlab.calibration.hidden import HiddenStates, Workspace
from quantlab.calibration.layer import Half, Layer
from quantlab.errors import CheckpointError
from quantlab.numerics.statistics import SiteStatistics
from tests.calibration.conftest import Whole
from tests.calibration.oracle import (
    CPU,
    LENGTH,
    SAMPLES,
    Seen,
    close,
    cross,
    embedded,
    filled,
    hessian,
    load_model,
    skeleton_of,
    tokens,
    watch,
)

EVERYTHING = ("magnitudes", "hessian", "cross")


def equal(one: SiteStatistics, other: SiteStatistics) -> bool:
    """Whether two statistics agree in every bit."""
    fields = vars(one)
    return all(
        torch.equal(value, getattr(other, name)) if isinstance(value, torch.Tensor) else value == getattr(other, name)
        for name, value in fields.items()
    )


def halves(layer: Layer) -> list[Half]:
    return list(layer.halves)


@pytest.mark.slow
def test_every_linear_of_every_layer(whole: Whole, tmp_path: Path) -> None:
    """No weights change between stages, so every stage's inputs equal those of the whole model."""
    skeleton = skeleton_of(whole.source)
    stream = embedded(skeleton, whole.weights, tmp_path)
    checked = set()
    for index in range(skeleton.layers):
        for half in halves(filled(skeleton, index, whole.weights)):
            for stage in half.stages:
                found = collect(Stream(half, stream), stage, needs=["magnitudes", "hessian"])
                assert tuple(found) == stage
                for site in stage:
                    for name in set(half.sites[site].weights) & set(whole.seen.inputs):
                        x, statistics = whole.seen.inputs[name], found[site]
                        assert statistics.count == len(x) == SAMPLES * LENGTH
                        assert close(statistics.hessian, hessian(x))
                        assert close(statistics.mean_square, x.double().square().mean(dim=0))
                        assert close(statistics.mean_abs, x.double().abs().mean(dim=0))
                        assert close(statistics.max_abs, x.double().abs().amax(dim=0))
                        assert statistics.cross is None
                        checked.add(name)
            advance(Stream(half, stream))
    assert checked == {name for name in whole.seen.inputs if "layers" in name}


def test_only_what_is_asked_for_is_computed(wholes: dict[str, Whole], tmp_path: Path) -> None:
    whole = wholes["llama"]
    skeleton = skeleton_of(whole.source)
    stream = Stream(filled(skeleton, 0, whole.weights).attention, embedded(skeleton, whole.weights, tmp_path))
    squares = collect(stream, ["attention"], needs=["squares"])["attention"]
    assert squares.hessian is None
    assert squares.cross is None
    assert squares.mean_abs is None
    assert squares.max_abs is None
    full = collect(stream, ["attention"], needs=["hessian"])["attention"]
    assert close(squares.mean_square, full.mean_square)
    assert torch.equal(full.mean_square, full.hessian.diagonal())


@pytest.mark.slow
def test_stopping_early_changes_no_bit(whole: Whole, tmp_path: Path) -> None:
    skeleton = skeleton_of(whole.source)
    stream = embedded(skeleton, whole.weights, tmp_path)
    for index in (0, 1):
        for half in filled(skeleton, index, whole.weights).halves:
            for stage in half.stages:
                early, late = (
                    collect(Stream(half, stream), stage, needs=["magnitudes", "hessian"], early_stop=stop)
                    for stop in (True, False)
                )
                assert all(equal(early[site], late[site]) for site in stage)
            advance(Stream(half, stream))


def test_stopping_early_computes_nothing_behind(wholes: dict[str, Whole], tmp_path: Path) -> None:
    whole = wholes["deepseek_v3"]
    skeleton = skeleton_of(whole.source)
    stream, layer = embedded(skeleton, whole.weights, tmp_path), filled(skeleton, 1, whole.weights)
    ran: list[str] = []
    layer.attention.sites["o"].module.register_forward_hook(lambda *_: ran.append("o"))
    layer.attention.sites["kv_latent"].module.register_forward_hook(lambda *_: ran.append("kv_b"))
    layer.mlp.sites["down"].module.register_forward_hook(lambda *_: ran.append("down"))
    collect(Stream(layer.attention, stream), ["attention", "q_latent", "kv_latent"], needs=["hessian"])
    assert not ran
    collect(Stream(layer.attention, stream), ["o"], needs=["hessian"])
    assert set(ran) == {"kv_b"}
    for name, weight in layer.weights.items():
        if ".experts." in name and "shared" not in name:
            weight.fill_(torch.nan)  # any computation with them gives NaN
    collect(Stream(layer.mlp, stream), ["down"], needs=["hessian"])
    assert set(ran) == {"kv_b"}
    assert not layer.mlp.sites["down"].module._forward_pre_hooks


def perturbed(whole: Whole, layer: int) -> tuple[dict[str, torch.Tensor], Seen]:
    """The weights with every linear of the layers up to `layer` changed, and a record of the model's run with them."""
    weights = {name: tensor.clone() for name, tensor in whole.weights.items()}
    generator = torch.Generator().manual_seed(3)
    for name, tensor in weights.items():
        if "_proj" in name and any(f"layers.{index}." in name for index in range(layer + 1)):
            tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    model = load_model(whole.dense)
    fused = {name: parameter for name, parameter in model.named_parameters() if "experts." in name}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
        for name, parameter in fused.items():
            if not name.endswith("_proj"):
                continue
            prefix = name.rpartition(".")[0]
            for expert in range(len(parameter)):
                parts = ("gate", "up") if name.endswith("gate_up_proj") else ("down",)
                parameter[expert] = torch.cat([weights[f"{prefix}.{expert}.{part}_proj.weight"] for part in parts])
    return weights, watch(model, tokens())


@pytest.mark.slow
@pytest.mark.parametrize("recorded", [False, True])
def test_cross_terms_with_a_changed_model(whole: Whole, tmp_path: Path, recorded: bool) -> None:
    weights, seen = perturbed(whole, 1)
    skeleton = skeleton_of(whole.source)
    changed, original = (embedded(skeleton, whole.weights, tmp_path) for _ in range(2))
    workspace = Workspace(tmp_path, memory_bytes=1 << 30, device=CPU)
    largest = 0.0
    for index in (0, 1):
        pairs = zip(filled(skeleton, index, weights).halves, filled(skeleton, index, whole.weights).halves, strict=True)
        for half, before in pairs:
            stream = Stream(before, original)
            if recorded:
                stream = record(stream, workspace)
                assert (stream.recorded is not None) == (half.experts is None)
            for stage in half.stages:
                found = collect(Stream(half, changed), stage, needs=EVERYTHING, original=stream)
                for site in stage:
                    for name in set(half.sites[site].weights) & set(seen.inputs):
                        x, unchanged = seen.inputs[name], whole.seen.inputs[name]
                        expected = cross(unchanged, x)
                        # the difference of nearly equal inputs contains their rounding errors
                        assert (found[site].cross - expected).abs().max() <= 1e-5 * hessian(x).abs().max()
                        assert close(found[site].hessian, hessian(x))
                        largest = max(largest, expected.abs().max().item())
            advance(Stream(half, changed))
            advance(stream)
        if index == 0:
            assert close(changed.read(slice(None)), seen.hidden[1], tolerance=1e-5)
            assert close(original.read(slice(None)), whole.seen.hidden[1], tolerance=1e-5)
    assert largest > 1e-3


def test_recording_changes_no_bit(whole: Whole, tmp_path: Path) -> None:
    skeleton = skeleton_of(whole.source)
    weights, _ = perturbed(whole, 0)
    half, before = filled(skeleton, 0, weights).attention, filled(skeleton, 0, whole.weights).attention
    changed, one, two = (embedded(skeleton, whole.weights, tmp_path) for _ in range(3))
    changed.write(slice(0, SAMPLES), changed.read(slice(None)) * 1.01)
    live, recorded = (
        Stream(before, one),
        record(Stream(before, two), Workspace(tmp_path, memory_bytes=1 << 30, device=CPU)),
    )
    for stage in half.stages:
        results = [collect(Stream(half, changed), stage, needs=EVERYTHING, original=s) for s in (live, recorded)]
        assert all(equal(results[0][site], results[1][site]) for site in stage)
    advance(live)
    advance(recorded)
    assert torch.equal(one.read(slice(None)), two.read(slice(None)))


def test_recording_without_memory_leaves_the_stream_as_it_is(wholes: dict[str, Whole], tmp_path: Path) -> None:
    whole = wholes["llama"]
    skeleton = skeleton_of(whole.source)
    stream = Stream(filled(skeleton, 0, whole.weights).attention, embedded(skeleton, whole.weights, tmp_path))
    assert record(stream, Workspace(tmp_path, memory_bytes=1000, device=CPU)) is stream
    assert torch.equal(stream.hidden.read(slice(None)), whole.seen.hidden[0])


def test_settling_changes_no_bit(whole: Whole, tmp_path: Path) -> None:
    skeleton, workspace = skeleton_of(whole.source), Workspace(tmp_path, memory_bytes=1 << 30, device=CPU)
    one, two = (embedded(skeleton, whole.weights, tmp_path) for _ in range(2))
    for index in (0, 1):
        layer = filled(skeleton, index, whole.weights)
        for half in layer.halves:
            plain, kept = Stream(half, one), keep_last_inputs(Stream(half, two), workspace)
            assert (kept.last is None) == (half.experts is not None)
            for stage in half.stages:
                for stream in (plain, kept):
                    collect(stream, stage, needs=["hessian"])
                for name in half.sites[stage[0]].weights:
                    layer.weights[name].mul_(1.01)
            advance(plain)
            advance(kept)
            assert torch.equal(one.read(slice(None)), two.read(slice(None)))


def test_collecting_an_earlier_stage_again_discards_the_last_inputs(wholes: dict[str, Whole], tmp_path: Path) -> None:
    whole = wholes["deepseek_v3"]
    skeleton, workspace = skeleton_of(whole.source), Workspace(tmp_path, memory_bytes=1 << 30, device=CPU)
    layer, hidden = filled(skeleton, 0, whole.weights), embedded(skeleton, whole.weights, tmp_path)
    stream = keep_last_inputs(Stream(layer.attention, hidden), workspace)
    collect(stream, ["o"], needs=["hessian"])
    layer.weights["model.layers.0.self_attn.kv_b_proj.weight"].mul_(2)
    collect(stream, ["q_latent", "kv_latent"], needs=["hessian"])
    expected = layer.attention.forward(hidden.read(slice(0, 2))).clone()
    advance(stream)
    assert torch.equal(hidden.read(slice(0, 2)), expected)


def test_settling_without_memory_leaves_the_stream_as_it_is(wholes: dict[str, Whole], tmp_path: Path) -> None:
    whole = wholes["llama"]
    skeleton = skeleton_of(whole.source)
    stream = Stream(filled(skeleton, 0, whole.weights).attention, embedded(skeleton, whole.weights, tmp_path))
    assert keep_last_inputs(stream, Workspace(tmp_path, memory_bytes=1000, device=CPU)) is stream


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("needs", [["squares"], ["hessian"], ["hessian", "cross"]])
def test_activations_that_are_not_finite(
    wholes: dict[str, Whole], tmp_path: Path, value: float, needs: list[str]
) -> None:
    whole = wholes["llama"]
    skeleton = skeleton_of(whole.source)
    layer, good = filled(skeleton, 1, whole.weights), embedded(skeleton, whole.weights, tmp_path)
    bad: HiddenStates = embedded(skeleton, whole.weights, tmp_path)
    values = bad.read(slice(3, 4)).clone()
    values[0, 2, 7] = value
    bad.write(slice(3, 4), values)
    streams = [(bad, good), (good, bad)] if "cross" in needs else [(bad, good)]
    for changed, original in streams:
        with pytest.raises(CheckpointError, match="activations are not finite") as problem:
            collect(
                Stream(layer.attention, changed), ["attention"], needs=needs, original=Stream(layer.attention, original)
            )
        assert "layer 1, input site attention" in str(problem.value)
        assert "128 of 128 channels are NaN or infinite" in str(problem.value) or value == torch.inf
