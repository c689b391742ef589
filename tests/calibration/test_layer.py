"""Layers allocated one at a time compute the same as transformers' whole model."""

from pathlib import Path

import pytest
import torch

from quantlab.calibration.collect import Stream, advance
from quantlab.checkpoint.index import open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.errors import CheckpointError
from quantlab.formats.stored import StoredWeights
from tests.calibration.conftest import Whole
from tests.calibration.oracle import (
    LENGTH,
    close,
    embedded,
    filled,
    load_model,
    skeleton_of,
    through,
    tokens,
    watch,
    write_dense,
)


def test_hidden_states_are_those_of_the_whole_model(whole: Whole, tmp_path: Path) -> None:
    skeleton = skeleton_of(whole.source)
    stream = embedded(skeleton, whole.weights, tmp_path)
    assert torch.equal(stream.read(slice(None)), whole.seen.hidden[0])
    for index in range(skeleton.layers):
        layer = filled(skeleton, index, whole.weights)
        at_once = layer.forward(stream.read(slice(0, 2)))
        through(layer, stream)
        found = stream.read(slice(None))
        assert close(at_once, found[:2], tolerance=1e-5)
        if index == skeleton.layers - 1:
            found = whole.model.model.norm(found)
        assert close(found, whole.seen.hidden[index + 1], tolerance=1e-5)


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("deepseek_v3", {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
                         "mscale": 1.0, "mscale_all_dim": 1.0}),
        ("deepseek_v2", {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
                         "mscale": 0.707, "mscale_all_dim": 0.707}),
        ("llama", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 64}),
        ("llama", {"type": "linear", "factor": 4.0}),
    ],
)  # fmt: skip
def test_scaled_positions(wholes: dict[str, Whole], tmp_path: Path, family: str, rope: dict[str, object]) -> None:
    directory = write_dense(wholes[family].dense, tmp_path / "scaled", rope_scaling=rope)
    seen = watch(load_model(directory), tokens())
    skeleton = skeleton_of(directory)
    stream = embedded(skeleton, wholes[family].weights, tmp_path)
    through(filled(skeleton, 0, wholes[family].weights), stream)
    assert close(stream.read(slice(None)), seen.hidden[1], tolerance=1e-5)
    assert not close(seen.hidden[1], wholes[family].seen.hidden[1], tolerance=1e-4)


def test_weights_have_the_names_of_the_checkpoint(whole: Whole) -> None:
    checkpoint = open_checkpoint(whole.source)
    source, skeleton = StoredWeights(Reader(checkpoint)), skeleton_of(whole.source)
    for index in range(skeleton.layers):
        prefix = f"model.layers.{index}."
        layer = skeleton.layer(index)
        assert layer.block == f"layer {index}"
        assert set(layer.weights) == {name for name in source.names() if name.startswith(prefix)}
        for name, weight in layer.weights.items():
            assert weight.shape == source.read_dense(name, torch.float32).shape


def test_layers_are_filled_from_the_released_checkpoint(whole: Whole) -> None:
    source, skeleton = StoredWeights(Reader(open_checkpoint(whole.source))), skeleton_of(whole.source)
    layer = skeleton.layer(1)
    layer.fill(lambda name: source.read_dense(name, torch.float32))
    for name, weight in layer.weights.items():
        assert torch.equal(weight, whole.weights[name])


def test_every_site_and_stage(whole: Whole) -> None:
    skeleton = skeleton_of(whole.source)
    for index in range(skeleton.layers):
        layer = skeleton.layer(index)
        latent = whole.source.name.startswith("deepseek")
        assert layer.attention.stages[0] == ("attention",)
        assert layer.attention.stages[-1] == ("o",)
        assert len(layer.attention.stages) == (3 if latent else 2)
        assert layer.mlp.stages == (("mlp",), ("down",))
        assert (layer.mlp.experts is not None) == (latent and index > 0)
        tensors = [skeleton.architecture.classify(name, hidden_layers=skeleton.layers) for name in layer.weights]
        linears = {c.name for c in tensors if c.rule is not None and c.rule.linear and c.expert is None}
        assert linears <= {name for half in layer.halves for site in half.sites.values() for name in site.weights}


def test_an_expert_is_changed_through_its_view(wholes: dict[str, Whole], tmp_path: Path) -> None:
    whole = wholes["deepseek_v3"]
    skeleton = skeleton_of(whole.source)
    layer = filled(skeleton, 1, whole.weights)
    x = whole.seen.hidden[1]
    before = layer.forward(x)
    index = whole.seen.routed["model.layers.1.mlp.experts"][1]
    for kind in ("gate", "up", "down"):
        layer.weights[f"model.layers.1.mlp.experts.5.{kind}_proj.weight"].zero_()
    after = layer.forward(x)
    changed = (before != after).any(dim=2).flatten()
    assert torch.equal(changed, (index == 5).any(dim=1))


def test_bfloat16_keeps_the_routers_bias_in_float32(wholes: dict[str, Whole], tmp_path: Path) -> None:
    whole = wholes["deepseek_v3"]
    skeleton = skeleton_of(whole.source, torch.bfloat16)
    stream = embedded(skeleton, whole.weights, tmp_path)
    layer = filled(skeleton, 0, whole.weights)
    advance(Stream(layer.attention, stream))
    advance(Stream(layer.mlp, stream))
    assert stream.dtype == torch.bfloat16
    assert close(stream.read(slice(None)).float(), whole.seen.hidden[1], tolerance=0.02)
    bias = filled(skeleton, 1, whole.weights).weights["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    assert torch.equal(bias, whole.weights["model.layers.1.mlp.gate.e_score_correction_bias"])
    through(filled(skeleton, 1, whole.weights), stream)


def test_a_sliding_window_shorter_than_the_samples_is_refused(wholes: dict[str, Whole], tmp_path: Path) -> None:
    whole = wholes["qwen2"]
    directory = write_dense(
        whole.dense, tmp_path / "window", use_sliding_window=True, sliding_window=16, max_window_layers=0
    )
    layer = filled(skeleton_of(directory), 0, whole.weights)
    with pytest.raises(CheckpointError, match="longer than the model's sliding window") as problem:
        layer.forward(whole.seen.hidden[0])
    assert f"{LENGTH} tokens, a window of 16" in str(problem.value)


def test_a_layer_with_a_module_in_neither_half_is_refused(wholes: dict[str, Whole]) -> None:
    skeleton = skeleton_of(wholes["llama"].source)
    skeleton._layers[1].after = torch.nn.Identity()
    skeleton.layer(0)
    with pytest.raises(CheckpointError, match="not consist of the two halves") as problem:
        skeleton.layer(1)
    assert "after" in str(problem.value)
