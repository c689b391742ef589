"""Passes against a direct computation: their use of statistics and of each other's results."""

from dataclasses import replace

import torch
from torch import Tensor

from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.statistics import SiteStatistics
from quantlab.passes.apply import Group, Inputs, apply_passes
from quantlab.recipe.algorithms import Gptq, SparseGpt
from quantlab.recipe.schema import Prune, Quantize


def statistics_of(X: Tensor) -> SiteStatistics:
    return SiteStatistics(len(X), X.square().mean(0), hessian=X.T @ X / max(len(X), 1))


def inputs_of(X: Tensor, prior: Tensor | None = None) -> Inputs:
    return Inputs(statistics_of(X), None if prior is None else statistics_of(prior))


def test_shrunk_statistics_are_those_of_own_tokens_and_the_priors_together() -> None:
    torch.manual_seed(0)
    own, others = torch.randn(30, 6), torch.randn(60, 6)
    shrunk = inputs_of(own, others).shrunk(10)  # a prior of ten tokens for each of six channels
    together = torch.cat([own, others])
    assert shrunk.hessian is not None
    torch.testing.assert_close(shrunk.hessian, together.T @ together / 90)
    torch.testing.assert_close(shrunk.mean_square, together.square().mean(0))


def test_an_expert_without_tokens_has_the_priors_statistics() -> None:
    torch.manual_seed(0)
    others = torch.randn(60, 6)
    none = Inputs(SiteStatistics(0, torch.zeros(6), hessian=torch.zeros(6, 6)), statistics_of(others))
    shrunk = none.shrunk(1.0)
    assert shrunk.hessian is not None
    torch.testing.assert_close(shrunk.hessian, others.T @ others / 60)


def test_zeros_of_pruning_stay_zeros_and_experts_together_are_experts_alone() -> None:
    torch.manual_seed(0)
    passes = (
        Prune(prune=0.5, algorithm=SparseGpt(name="sparsegpt")),
        Quantize(quantize="int4_g32", algorithm=Gptq(name="gptq", correction=0)),
    )
    groups = [
        Group({f"{e}.gate": torch.randn(8, 64), f"{e}.up": torch.randn(8, 64)}, inputs_of(torch.randn(300, 64)))
        for e in range(3)
    ]
    together = apply_passes(groups, passes, dtype=torch.bfloat16)
    assert list(together) == [name for group in groups for name in group.weights]
    for group in groups:
        for name, (alone, report) in apply_passes([group], passes, dtype=torch.bfloat16).items():
            found, _ = together[name]
            assert isinstance(alone, QuantizedMatrix)
            assert isinstance(found, QuantizedMatrix)
            assert torch.equal(alone.q, found.q)
            assert torch.equal(alone.scale, found.scale)
            assert report is not None
            assert report.output_error is not None
        zeros = sum(
            int((found.q == 0).sum())
            for name in group.weights
            if isinstance(found := together[name][0], QuantizedMatrix)
        )
        assert zeros >= 8 * 64, "half of both matrices"


def test_adjustments_of_statistics_are_counted() -> None:
    """Increased damping, inputs that were always zero, and rows with a smaller error under plain rounding."""
    torch.manual_seed(0)
    X = torch.randn(300, 1) + 0.1 * torch.randn(300, 64)
    X[:, 5] = 0
    inputs = inputs_of(X)
    H = inputs.own.hessian
    assert H is not None
    indefinite = Inputs(replace(inputs.own, hessian=1.1 * H - 0.1 * H.diagonal().diag()))
    passes = (Quantize(quantize="int4_g32", algorithm=Gptq(name="gptq", correction=0)),)
    for known, damped in ((inputs, False), (indefinite, True)):
        _, report = apply_passes([Group({"w": torch.randn(8, 64)}, known)], passes, dtype=torch.bfloat16)["w"]
        assert report is not None
        assert (report.damping is not None and report.damping > 0.01) == damped
        assert report.dead_columns == 1
    grid = torch.randint(-8, 8, (8, 64)).float()
    grid[:, ::32] = -8
    _, exact = apply_passes([Group({"w": grid}, inputs)], passes, dtype=torch.bfloat16)["w"]
    assert exact is not None
    assert exact.relative_error == 0


def test_an_expert_without_tokens_says_what_it_was_changed_by() -> None:
    torch.manual_seed(0)
    prior = statistics_of(torch.randn(60, 64))
    none = Inputs(SiteStatistics(0, torch.zeros(64), hessian=torch.zeros(64, 64)), prior)
    for shrinkage, words in ((1.0, "by the statistics of all tokens"), (0.0, "as if all its inputs mattered alike")):
        passes = (Quantize(quantize="int4_g32", algorithm=Gptq(name="gptq", correction=0, shrinkage=shrinkage)),)
        _, report = apply_passes([Group({"w": torch.randn(8, 64)}, none)], passes, dtype=torch.bfloat16)["w"]
        assert report is not None
        assert report.fallback.endswith(words)


def test_int8_weights_can_be_rounded_by_gptq_too() -> None:
    torch.manual_seed(0)
    X = torch.randn(400, 64) @ torch.randn(64, 64)
    passes = (Quantize(quantize="int8", algorithm=Gptq(name="gptq", correction=0)),)
    weight, report = apply_passes([Group({"w": torch.randn(32, 64)}, inputs_of(X))], passes, dtype=torch.bfloat16)["w"]
    assert isinstance(weight, QuantizedMatrix)
    assert weight.bits == 8
    assert weight.scale.shape == (32, 1)
    assert report is not None
    assert report.output_error is not None
    assert report.rtn_output_error is not None
    assert report.output_error < 0.8 * report.rtn_output_error
