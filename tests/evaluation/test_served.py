"""The served path: its numbers against transformers, and planted faults of the decoder that it detects."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantlab.checkpoint.tokenizer import load_tokenizer
from quantlab.errors import EvaluationError
from quantlab.evaluation.processes.messages import ServedRequest
from quantlab.evaluation.quality.windows import HeldOut, cut, read_corpus
from quantlab.evaluation.served import measure
from quantlab.evaluation.served.measure import choose, compare, decode, greedy_shares, measure_served
from quantlab.evaluation.served.metrics import Served
from quantlab.evaluation.suite import ServedSuite, load_suite
from quantlab.recipe.schemes import SCHEMES
from quantlab.runtime.decode import Decoder
from quantlab.runtime.decoding import fused_step
from quantlab.runtime.load import load
from quantlab.runtime.native.library import library
from tests.evaluation.conftest import write_tokenizer
from tests.runtime.tiny import quantize, write_checkpoint

FEW = ServedSuite(sequences=6, prefix=8, steps=5, greedy_tokens=6)
fused = pytest.mark.skipif(library() is None, reason="no native kernels here, so no fused steps")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("models") / "source", "deepseek_v3", vocab_size=320)
    write_tokenizer(directory)
    return directory


@pytest.fixture
def text(source: Path, corpus: Path) -> HeldOut:
    tokenizer, prefix = load_tokenizer(source)
    return cut(read_corpus(corpus), tokenizer, prefix, length=24, tokens_per_domain=600)


def served(directory: Path, suite: Path) -> Served:
    return measure_served(ServedRequest(directory=directory, suite=suite, predictions=None), lambda *_: None)


def test_excerpts_are_of_different_documents_and_know_their_place_among_the_scored_tokens(text: HeldOut) -> None:
    excerpts = choose(text, FEW)
    assert len({excerpt.document for excerpt in excerpts}) == len(excerpts) == 6
    scored = np.concatenate([window.tokens[window.first :] for window in text.windows])
    for excerpt in excerpts:
        assert (excerpt.prefix, excerpt.steps) == (8, 5)
        predicted = excerpt.tokens[excerpt.prefix + 1 :].tolist()
        assert scored[excerpt.first : excerpt.first + excerpt.steps].tolist() == predicted
    short = choose(text, ServedSuite(prefix=100, steps=100))
    assert all(excerpt.prefix >= excerpt.steps > 0 for excerpt in short), "from the middle of the window on"


def test_numbers_are_those_of_transformers(source: Path, text: HeldOut) -> None:
    """Oracle: teacher-forced logits and greedy text in float32, without the runtime."""
    excerpts = choose(text, FEW)
    found = decode(load(source), excerpts, FEW, lambda *_: None)
    ours = load(source, dtype=torch.float32)
    table = compare(ours, excerpts, found, None)
    shares = greedy_shares(ours, found.greedy, FEW.greedy_tokens)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for row, (excerpt, logits) in enumerate(zip(excerpts, found.logits, strict=True)):
        with torch.inference_mode():
            exact = model(excerpt.tokens[None]).logits[0, excerpt.prefix : -1].double().log_softmax(-1)
            wanted = model.generate(
                excerpt.tokens[None, :8], max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None
            )
        ours_16 = logits.double().log_softmax(-1)
        kl = (exact.exp() * (exact - ours_16)).sum()
        assert table[row, 0] == pytest.approx(float(kl), rel=1e-2, abs=1e-5)
        assert table[row, 1] == (exact.argmax(-1) == ours_16.argmax(-1)).sum()
        differing = (wanted[0, 8:] != found.greedy[row, 8:]).nonzero()
        assert shares[row] == (float(differing[0]) / 6 if len(differing) else 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [None, "int8", "int4_g128"])
def test_a_sound_decoder_is_near_float32(source: Path, suite: Path, tmp_path: Path, scheme: str | None) -> None:
    directory = source if scheme is None else quantize(source, tmp_path / "artifact", SCHEMES[scheme]).directory  # type: ignore[index]
    found = served(directory, suite)
    assert found.served_dtype == "bfloat16"
    assert found.served_steps.startswith("fused steps" if library() is not None else "single steps, not fused: ")
    assert found.served_kl.n >= 100
    assert found.served_kl.value < 1e-2
    assert found.served_top1_agreement.value > 0.9
    assert found.greedy_agreement.value > 0.1, (
        "64 tokens in a row of a model without knowledge, whose likeliest tokens are close"
    )
    assert found.served_kl_to_baseline is None


def turned(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary angles of the next position."""
    return cos.roll(-1, 0).contiguous(), sin.roll(-1, 0).contiguous()


@pytest.mark.slow
@fused
@pytest.mark.parametrize("fault", ["rotation", "norm", "router"])
def test_a_fault_of_the_fused_step_is_found(
    source: Path, suite: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    sound = served(source, suite)
    if fault == "rotation":
        angles = fused_step._angles
        monkeypatch.setattr(fused_step, "_angles", lambda *given: turned(*angles(*given)))
    elif fault == "norm":
        norm = fused_step._row_norm
        monkeypatch.setattr(
            fused_step,
            "_row_norm",
            lambda given: dataclasses.replace(norm(given), weight=torch.ones_like(given.weight)),
        )
    else:
        experts = fused_step._experts
        monkeypatch.setattr(
            fused_step,
            "_experts",
            lambda parts, kernels: experts(
                dataclasses.replace(parts, weight=parts.weight.flip(0).contiguous()), kernels
            ),
        )
    broken = served(source, suite)
    assert broken.served_kl.low > 4 * sound.served_kl.value
    assert broken.served_kl.low > 1e-3, "what the matrix warns of"
    assert broken.greedy_agreement.value <= sound.greedy_agreement.value


@pytest.mark.slow
def test_a_fault_of_the_plain_step_is_found(source: Path, suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Off(Decoder):
        """Decodes the token preceding the given one."""

        def __init__(self, *given: object, **named: object) -> None:
            super().__init__(*given, **named, fuse=False)  # type: ignore[arg-type]

        def step(self, tokens: Tensor) -> Tensor:
            return super().step((tokens - 1).clamp_min(0))

    monkeypatch.setattr(measure, "Decoder", Off)
    found = served(source, suite)
    assert found.served_steps == "single steps, not fused: fused steps are turned off"
    assert found.served_kl.low > 1e-2


def test_logits_that_are_not_finite_are_an_error(source: Path, text: HeldOut) -> None:
    model = load(source)
    model.model.norm.weight.data.fill_(float("inf"))
    with pytest.raises(EvaluationError, match="logits of the served model are not finite"):
        decode(model, choose(text, FEW), FEW, lambda *_: None)


def test_shipped_suites_step_through_five_hundred_tokens() -> None:
    for path in (Path(__file__).parents[2] / "eval" / "suites").rglob("*.yaml"):
        loaded = load_suite(path).suite
        assert loaded.served.sequences * loaded.served.steps >= 500
        assert loaded.served.prefix + loaded.served.steps < loaded.text.length
        assert loaded.served.sequences - 4 >= 10, "degrees of freedom over the four domains of the held-out text"
