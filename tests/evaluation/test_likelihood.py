"""Likelihoods of trees of answers against separate sequences, with transformers' own model in float64."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from quantlab.checkpoint.tokenizer import load_tokenizer
from quantlab.errors import EvaluationError
from quantlab.evaluation.tasks.likelihood import Text, encode, likelihoods
from quantlab.runtime.load import load
from tests.evaluation.test_predictions import dense_model

ITEMS = [
    [
        Text((0, 5, 6, 7, 8), 3),
        Text((0, 5, 6, 9), 3),
        Text((0, 5, 6, 7, 11, 12), 3),
    ],  # the second token of the answers is shared too
    [Text((0, 40, 41), 1)],
    [Text((0, 5, 6), 2), Text((0, 5, 6), 2)],  # two equal answers
    [Text((0, 100, 101, 102, 103, 104, 105, 106, 107), 8), Text((0, 99), 1)],
]


def alone(model: LlamaForCausalLM, text: Text) -> tuple[float, bool]:
    """One separate sequence, in float64."""
    logits = model.double()(input_ids=torch.tensor([text.tokens])).logits[0].detach()
    model.float()
    steps = range(text.first, len(text.tokens))
    total = sum(torch.log_softmax(logits[step - 1], -1)[text.tokens[step]].item() for step in steps)
    return total, all(logits[step - 1].argmax().item() == text.tokens[step] for step in steps)


@pytest.mark.parametrize("batch_tokens", [1, 16, 4096])
def test_a_tree_scores_like_its_sequences_alone(batch_tokens: int) -> None:
    model = dense_model(0)
    found = likelihoods(model, ITEMS, batch_tokens=batch_tokens)
    assert [len(item) for item in found] == [3, 1, 2, 2]
    for item, answers in zip(ITEMS, found, strict=True):
        for text, answer in zip(item, answers, strict=True):
            logprob, greedy = alone(model, text)
            assert answer.logprob == pytest.approx(logprob, abs=2e-5)
            assert (answer.greedy, answer.tokens) == (greedy, len(text.tokens) - text.first)
    chosen = model(input_ids=torch.tensor([[0, 40]])).logits[0, -1].argmax().item()
    assert likelihoods(model, [[Text((0, 40, chosen), 2)]])[0][0].greedy


def test_latent_attention_and_experts_see_the_same_tree(model: Path) -> None:
    mixture = load(model, dtype=torch.float32)
    trees = likelihoods(mixture, ITEMS)
    single = likelihoods(mixture, [[text] for item in ITEMS for text in item])
    flat = [answer.logprob for item in trees for answer in item]
    assert flat == pytest.approx([answer[0].logprob for answer in single], abs=1e-4)


def test_spaces_at_the_seam_belong_to_the_continuation(model: Path) -> None:
    tokenizer, prefix = load_tokenizer(model)
    joined, parted = encode(tokenizer, prefix, "the sun", " rose"), encode(tokenizer, prefix, "the sun ", "rose")
    assert joined == parted
    assert tokenizer.decode(list(joined.tokens[joined.first :])) == " rose"
    assert encode(tokenizer, prefix, "", "the sun").first == len(prefix)


@pytest.mark.parametrize(("prefix", "context", "continuation"), [((), "", "word"), ((0,), "word", "")])
def test_nothing_to_score_is_an_error(model: Path, prefix: tuple[int, ...], context: str, continuation: str) -> None:
    tokenizer, _ = load_tokenizer(model)
    with pytest.raises(EvaluationError, match="an item cannot be scored"):
        encode(tokenizer, prefix, context, continuation)


def test_an_item_longer_than_the_context_is_an_error() -> None:
    model = dense_model(0)
    model.config.max_position_embeddings = 8
    with pytest.raises(EvaluationError, match="longer than the model's context"):
        likelihoods(model, [[Text(tuple(range(10)), 1)]])
