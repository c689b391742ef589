"""Routed experts: routing and statistics against a token-by-token oracle."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from quantlab.calibration.collect import Stream, advance, collect
from quantlab.calibration.moe import MoeInputs, collect_moe
from quantlab.errors import CheckpointError
from tests.calibration.conftest import Whole
from tests.calibration.oracle import LENGTH, SAMPLES, close, cross, embedded, filled, hessian, skeleton_of
from tests.calibration.test_collect import perturbed

FAMILIES = ("deepseek_v2", "deepseek_v3")
EXPERTS = 8
PREFIX = "model.layers.1.mlp."


def expert(weights: dict[str, Tensor], number: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(weights[f"{PREFIX}experts.{number}.{kind}_proj.weight"] for kind in ("gate", "up", "down"))


def entering(weights: dict[str, Tensor], number: int, x: Tensor) -> Tensor:
    """Inputs of the expert's down projection, in float64."""
    gate, up, _ = expert(weights, number)
    return silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)


def inputs_of(whole: Whole, weights: dict[str, Tensor], directory: Path, **options: object) -> MoeInputs:
    """Layer 1 of a changed model and of the unchanged one; layer 0 is changed too."""
    skeleton = skeleton_of(whole.source)
    streams = []
    for tensors in (weights, whole.weights):
        hidden = embedded(skeleton, whole.weights, directory, **options)
        for half in (*filled(skeleton, 0, tensors).halves, filled(skeleton, 1, tensors).attention):
            advance(Stream(half, hidden))
        streams.append(Stream(filled(skeleton, 1, tensors).mlp, hidden))
    return collect_moe(streams[0], needs=["hessian", "cross"], original=streams[1])


def route(family: str, weights: dict[str, Tensor], x: Tensor) -> dict[int, float]:
    """Experts and weights of one token [H] by the papers' rules, computed number by number."""
    logits = weights[f"{PREFIX}gate.weight"].double() @ x.double()
    if family == "deepseek_v2":
        scores = logits.softmax(dim=0).tolist()
        return {e: scores[e] for e in sorted(range(EXPERTS), key=lambda e: -scores[e])[:2]}
    scores = logits.sigmoid().tolist()
    bias = weights[f"{PREFIX}gate.e_score_correction_bias"].tolist()
    choice = [score + b for score, b in zip(scores, bias, strict=True)]
    groups = [range(start, start + 2) for start in range(0, EXPERTS, 2)]
    best = sorted(groups, key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[:2]))[:2]
    chosen = sorted((e for group in best for e in group), key=lambda e: -choice[e])[:2]
    total = sum(scores[e] for e in chosen)
    return {e: 2.5 * scores[e] / total for e in chosen}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_gets_the_tokens_routed_to_it(wholes: dict[str, Whole], tmp_path: Path, family: str) -> None:
    whole = wholes[family]
    found = inputs_of(whole, whole.weights, tmp_path)
    x, index, weights = whole.seen.routed[PREFIX + "experts"]
    routes = [route(family, whole.weights, token) for token in x]
    for number in range(EXPERTS):
        rows = [row for row, chosen in enumerate(routes) if number in chosen]
        assert found.rows(number).tolist() == rows
        assert found.tokens_per_expert[number] == len(rows)
        expected = torch.tensor([routes[row][number] for row in rows])
        assert torch.allclose(found.gate_weights(number), expected, rtol=1e-4)
        theirs = (index == number).nonzero()
        assert torch.equal(theirs[:, 0], found.rows(number))
        assert close(found.gate_weights(number), weights[theirs[:, 0], theirs[:, 1]])
        assert close(found.inputs(number), x[rows], tolerance=1e-5)
    assert sum(found.tokens_per_expert) == 2 * SAMPLES * LENGTH
    assert found.layer.count == SAMPLES * LENGTH
    assert close(found.layer.hessian, hessian(x))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_of_every_expert(wholes: dict[str, Whole], tmp_path: Path, family: str) -> None:
    whole = wholes[family]
    weights, seen = perturbed(whole, 1)
    found = inputs_of(whole, weights, tmp_path)
    x, index, routing = seen.routed[PREFIX + "experts"]
    unchanged = whole.seen.routed[PREFIX + "experts"][0]
    assert (found.layer.cross - cross(unchanged, x)).abs().max() <= 1e-5 * hessian(x).abs().max()
    for number in range(EXPERTS):
        chosen = (index == number).any(dim=1)
        gate, up, down = expert(weights, number)
        mine, before = x[chosen], unchanged[chosen]
        gate_up = found.statistics(number, ["hessian", "cross", "magnitudes"])
        assert gate_up.count == chosen.sum()
        assert close(gate_up.hessian, hessian(mine))
        assert close(gate_up.max_abs, mine.abs().amax(dim=0))
        assert (gate_up.cross - cross(before, mine)).abs().max() <= 1e-5 * hessian(mine).abs().max()
        inner, inner_before = entering(weights, number, mine), entering(whole.weights, number, before)
        below = found.down_statistics(number, gate, up, ["hessian", "cross"])
        assert close(below.hessian, hessian(inner))
        assert (below.cross - cross(inner_before, inner)).abs().max() <= 1e-5 * hessian(inner).abs().max()
        other = (number + 1) % EXPERTS  # as if experts before it had been removed
        renumbered = found.down_statistics(number, gate, up, ["cross"], unchanged_expert=other)
        inner_before = entering(whole.weights, other, before)
        assert (renumbered.cross - cross(inner_before, inner)).abs().max() <= 1e-5 * hessian(inner).abs().max()
        norms = (inner @ down.double().T).norm(dim=1)
        gates = (routing * (index == number)).sum(dim=1)[chosen]
        assert found.gated_norm(number, gate, up, down) == pytest.approx((gates * norms).sum().item(), rel=1e-5)


def test_the_prior_of_down_is_the_expert_on_tokens_of_others(wholes: dict[str, Whole], tmp_path: Path) -> None:
    whole = wholes["deepseek_v3"]
    found = inputs_of(whole, whole.weights, tmp_path)
    x = whole.seen.routed[PREFIX + "experts"][0]
    rows = found.sample(36)
    assert rows.tolist() == list(range(0, SAMPLES * LENGTH, 4))
    assert len(found.sample(10_000)) == SAMPLES * LENGTH
    gate, up, _ = expert(whole.weights, 3)
    prior = found.down_statistics(3, gate, up, ["hessian"], rows=rows)
    assert prior.count == 36
    assert close(prior.hessian, hessian(entering(whole.weights, 3, x[rows])))


def test_an_expert_without_routed_tokens(wholes: dict[str, Whole], tmp_path: Path) -> None:
    whole = wholes["deepseek_v3"]
    weights = {**whole.weights}
    name = f"{PREFIX}gate.e_score_correction_bias"
    weights[name] = weights[name].clone()
    weights[name][2] = -10
    found = inputs_of(whole, weights, tmp_path)
    assert found.tokens_per_expert[2] == 0
    assert len(found.rows(2)) == len(found.gate_weights(2)) == len(found.inputs(2)) == 0
    gate, up, down = expert(weights, 2)
    for statistics in (
        found.statistics(2, ["hessian", "cross"]),
        found.down_statistics(2, gate, up, ["hessian", "cross"]),
    ):
        assert statistics.count == 0
        assert not statistics.hessian.any()
        assert not statistics.cross.any()
    assert found.gated_norm(2, gate, up, down) == 0
    assert found.down_statistics(2, gate, up, ["hessian"], rows=found.sample(64)).hessian.any()


def test_shared_experts_read_what_the_layer_reads(wholes: dict[str, Whole], tmp_path: Path) -> None:
    whole = wholes["deepseek_v3"]
    skeleton = skeleton_of(whole.source)
    stream = Stream(filled(skeleton, 1, whole.weights).mlp, embedded(skeleton, whole.weights, tmp_path))
    site = collect(stream, ["mlp"], needs=["hessian"])["mlp"]
    assert torch.equal(collect_moe(stream, needs=["hessian"]).layer.hessian, site.hessian)


def test_a_norm_changed_later_does_not_change_the_inputs(wholes: dict[str, Whole], tmp_path: Path) -> None:
    whole = wholes["deepseek_v3"]
    skeleton = skeleton_of(whole.source)
    layer = filled(skeleton, 1, whole.weights)
    found = collect_moe(Stream(layer.mlp, embedded(skeleton, whole.weights, tmp_path)))
    before = found.inputs(1)
    layer.weights["model.layers.1.post_attention_layernorm.weight"].mul_(2)
    assert torch.equal(found.inputs(1), before)


def test_an_expert_whose_activations_are_not_finite(wholes: dict[str, Whole], tmp_path: Path) -> None:
    whole = wholes["deepseek_v3"]
    found = inputs_of(whole, whole.weights, tmp_path)
    gate, up, _ = expert(whole.weights, 4)
    with pytest.raises(CheckpointError, match="activations are not finite") as problem:
        found.down_statistics(4, gate * torch.nan, up, ["hessian"])
    assert "layer 1, expert 4, input site down" in str(problem.value)
