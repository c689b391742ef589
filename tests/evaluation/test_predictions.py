"""Scores against a slow obvious oracle: a plain transformers model, one window at a time, float64."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from quantlab.errors import EvaluationError
from quantlab.evaluation.quality.baseline import Baseline, BaselineWriter, TokenScores
from quantlab.evaluation.quality.measure import summarise
from quantlab.evaluation.quality.predictions import score
from quantlab.evaluation.quality.windows import HeldOut
from quantlab.runtime.load import load


def dense_model(seed: int, *, spread: float = 0.2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=spread,
    )
    return LlamaForCausalLM(config).eval()


def oracle_log_probabilities(model: LlamaForCausalLM, held_out: HeldOut) -> Tensor:
    """Log-probabilities of every scored position [T, V], float64."""
    model = model.double()
    rows = []
    for window in held_out.windows:
        logits = model(input_ids=torch.from_numpy(window.tokens)[None]).logits[0]
        rows.append(torch.log_softmax(logits[window.first - 1 : -1], dim=-1))
    model.float()
    return torch.cat(rows).detach()


def targets(held_out: HeldOut) -> Tensor:
    return torch.cat([torch.from_numpy(window.tokens[window.first :]) for window in held_out.windows])


def keep_baseline(model: LlamaForCausalLM, held_out: HeldOut, directory: Path) -> TokenScores:
    return score(model, held_out, keep=BaselineWriter(directory, key="k", tokens_sha256=held_out.sha256))


def compare(model: LlamaForCausalLM, held_out: HeldOut, directory: Path, **options: int) -> TokenScores:
    baseline = Baseline(directory, tokens_sha256=held_out.sha256, dtype=torch.float32)
    return score(model, held_out, baseline=baseline, **options)


def test_scores_equal_the_oracle(held_out: HeldOut, tmp_path: Path) -> None:
    first, second = dense_model(0), dense_model(1)
    baseline = keep_baseline(first, held_out, tmp_path / "kept")
    scores = compare(second, held_out, tmp_path / "kept")
    p, q, target = (
        oracle_log_probabilities(first, held_out),
        oracle_log_probabilities(second, held_out),
        targets(held_out),
    )
    nll = -q.gather(1, target[:, None])[:, 0]
    kl = (p.exp() * (p - q)).sum(-1)
    assert len(scores.nll) == held_out.tokens > 200
    torch.testing.assert_close(scores.nll.double(), nll, rtol=1e-5, atol=1e-5)
    assert scores.kl is not None
    torch.testing.assert_close(scores.kl.double(), kl, rtol=1e-4, atol=1e-5)
    assert torch.equal(scores.top1, q.argmax(-1))
    assert torch.equal(scores.correct, q.argmax(-1) == target)

    quality = summarise(held_out, scores, baseline, compute_dtype="float32")
    assert quality.perplexity.value == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    nbytes = sum(window.nbytes for window in held_out.windows)
    assert quality.bits_per_byte.value == pytest.approx(float(nll.sum()) / math.log(2) / nbytes, rel=1e-5)
    assert quality.next_token_accuracy.value == pytest.approx(float((q.argmax(-1) == target).double().mean()))
    assert quality.kl_to_baseline is not None
    assert quality.kl_to_baseline.value == pytest.approx(float(kl.mean()), rel=1e-4)
    assert quality.top1_agreement is not None
    assert quality.top1_agreement.value == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    base_nll = -p.gather(1, target[:, None])[:, 0]
    assert quality.perplexity_change_percent is not None
    assert quality.perplexity_change_percent.value == pytest.approx(
        100 * (math.exp(nll.mean() - base_nll.mean()) - 1), rel=1e-4
    )
    assert all(m.low <= m.value <= m.high for m in (quality.perplexity, quality.kl_to_baseline, quality.top1_agreement))
    assert quality.perplexity.n == held_out.tokens == sum(domain.perplexity.n for domain in quality.domains.values())


def test_hidden_states_give_the_stored_logits_bit_for_bit(held_out: HeldOut, tmp_path: Path) -> None:
    model = dense_model(0)
    keep_baseline(model, held_out, tmp_path / "kept")
    baseline = Baseline(tmp_path / "kept", tokens_sha256=held_out.sha256, dtype=torch.float32)
    with torch.inference_mode():
        done = 0
        for windows in held_out.batches(4096):
            span = slice(done, done + sum(window.scored for window in windows))
            places, hidden = baseline.read(span)
            done = span.stop
            assert torch.equal(places, torch.arange(len(hidden)))
            longest = len(windows[0].tokens)
            ids = torch.stack(
                [torch.nn.functional.pad(torch.from_numpy(w.tokens), (0, longest - len(w.tokens))) for w in windows]
            )
            states = model.model(input_ids=ids).last_hidden_state
            expected = torch.cat([states[row, w.first - 1 : len(w.tokens) - 1] for row, w in enumerate(windows)])
            assert torch.equal(model.lm_head(expected), torch.nn.functional.linear(hidden, baseline.head))


def test_a_model_is_at_no_distance_from_itself(held_out: HeldOut, tmp_path: Path) -> None:
    model = dense_model(2)
    baseline = keep_baseline(model, held_out, tmp_path / "kept")
    scores = compare(model, held_out, tmp_path / "kept")
    assert scores.kl is not None
    assert scores.kl.abs().max() == 0
    quality = summarise(held_out, scores, baseline, compute_dtype="float32")
    for measured, expected in (
        (quality.kl_to_baseline, 0),
        (quality.top1_agreement, 1),
        (quality.perplexity_change_percent, 0),
    ):
        assert measured is not None
        assert (measured.value, measured.low, measured.high) == (expected, expected, expected)


def test_padding_and_batching_change_nothing(held_out: HeldOut, model: Path) -> None:
    mixture = load(model, dtype=torch.float32)
    padded = score(mixture, held_out, batch_tokens=10**6)
    alone = score(mixture, held_out, batch_tokens=1)
    torch.testing.assert_close(padded.nll, alone.nll, rtol=1e-5, atol=1e-5)
    assert torch.equal(padded.top1, alone.top1)


def test_the_baseline_itself_is_compared_with_nothing(held_out: HeldOut) -> None:
    quality = summarise(held_out, score(dense_model(0), held_out), None, compute_dtype="float32")
    assert (
        quality.kl_to_baseline
        is quality.top1_agreement
        is quality.perplexity_change_percent
        is quality.accuracy_loss_percent
        is None
    )


def test_accuracy_is_lost_relative_to_the_baseline(held_out: HeldOut) -> None:
    right = torch.zeros(held_out.tokens, dtype=torch.bool)
    right[::2] = True
    lower = right.clone()
    lower[::20] = False  # every tenth of the right ones
    some = torch.ones(held_out.tokens)
    tokens = torch.zeros(held_out.tokens, dtype=torch.int64)
    baseline = TokenScores(some, tokens, some, right, None)
    scores = TokenScores(some, tokens, some, lower, some)
    loss = summarise(held_out, scores, baseline, compute_dtype="float32").accuracy_loss_percent
    assert loss is not None
    assert loss.value == pytest.approx(10, abs=0.5)
    assert 0 < loss.low < loss.value < loss.high
    never_right = dataclasses.replace(baseline, correct=torch.zeros_like(right))
    assert summarise(held_out, scores, never_right, compute_dtype="float32").accuracy_loss_percent is None


def test_infinities_are_an_error(held_out: HeldOut) -> None:
    model = dense_model(0)
    with torch.no_grad():
        model.lm_head.weight[3] = math.inf
    with pytest.raises(EvaluationError, match="not finite"):
        score(model, held_out)


def test_a_perplexity_beyond_numbers_is_an_error(held_out: HeldOut) -> None:
    model = dense_model(0)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    with pytest.raises(EvaluationError, match="perplexity overflows"):
        summarise(held_out, score(model, held_out), None, compute_dtype="float32")


def test_other_tokens_than_the_baselines_are_an_error(held_out: HeldOut, tmp_path: Path) -> None:
    keep_baseline(dense_model(0), held_out, tmp_path / "kept")
    with pytest.raises(EvaluationError, match="different tokens"):
        Baseline(tmp_path / "kept", tokens_sha256="other", dtype=torch.float32)


def test_predictions_are_stored_as_an_array_others_can_open(held_out: HeldOut, tmp_path: Path) -> None:
    keep_baseline(dense_model(0), held_out, tmp_path / "kept")
    hidden = np.load(tmp_path / "kept" / "hidden.npy", mmap_mode="r")
    assert hidden.shape == (held_out.tokens, 64)
    assert hidden.dtype == np.float32


@pytest.mark.parametrize("batch_tokens", [4096, 50])
def test_a_bounded_sample_gives_the_kl_of_its_tokens(held_out: HeldOut, tmp_path: Path, batch_tokens: int) -> None:
    first, second = dense_model(0), dense_model(1)
    everything = keep_baseline(first, held_out, tmp_path / "all")
    whole = compare(second, held_out, tmp_path / "all")
    most = -(-held_out.tokens // 3) * 64 * 4 + 100
    writer = BaselineWriter(tmp_path / "some", key="k", tokens_sha256=held_out.sha256, most_bytes=most)
    sampled = score(first, held_out, keep=writer, batch_tokens=batch_tokens)
    hidden = np.load(tmp_path / "some" / "hidden.npy", mmap_mode="r")
    assert hidden.shape == (-(-held_out.tokens // 3), 64)
    assert hidden.nbytes <= most
    scores = compare(second, held_out, tmp_path / "some", batch_tokens=batch_tokens)
    assert whole.kl is not None
    assert scores.kl is not None
    torch.testing.assert_close(scores.kl, whole.kl[::3], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(scores.nll, whole.nll, rtol=1e-5, atol=1e-5)
    itself = compare(first, held_out, tmp_path / "some", batch_tokens=batch_tokens).kl
    assert itself is not None
    assert itself.abs().max() == 0

    full = summarise(held_out, whole, everything, compute_dtype="float32")
    found = summarise(held_out, scores, sampled, compute_dtype="float32")
    assert found.divergence is not None
    assert full.divergence is not None
    assert full.divergence.kl_sample == f"all {held_out.tokens:,} tokens"
    assert found.divergence.kl_sample == f"one in 3 of {held_out.tokens:,} tokens"
    assert found.kl_to_baseline == found.divergence.kl_mean
    assert found.divergence.kl_mean.value == pytest.approx(float(whole.kl[::3].double().mean()), rel=1e-3)
    assert found.divergence.kl_mean.n == found.divergence.kl_median.n == len(scores.kl)
    assert found.divergence.kl_median.value == pytest.approx(float(whole.kl[::3].median()), rel=1e-3)
    assert found.top1_agreement == full.top1_agreement, "of every token, as all but the KL"
