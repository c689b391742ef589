"""Log-likelihoods of given continuations after given contexts, by which tasks with choices are scored.

The answers of one item share a long prefix, often all but a few tokens. The prefix is computed once: the item's sequences are
laid out as a tree in one row, first their common stem, then the branches one after the other,

    stem:  the keys to the cabinet      branch 0:  are here      branch 1:  is here

with positions that continue from the stem in each branch, and a mask that lets a token attend only to the stem and to its own
branch. The results equal those of each sequence alone, up to the order of sums. Trees of similar size form one batch, padded on
the right; no token attends to the padding.

A continuation is encoded together with its context, because a token may span the boundary. Spaces at the end of the context
belong to the continuation. lm-eval does the same, so scores are comparable.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from quantlab.checkpoint.tokenizer import text_tokens
from quantlab.errors import EvaluationError
from quantlab.evaluation.quality.predictions import BATCH_TOKENS, score_states


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of one continuation.

    Attributes:
        logprob: log-probability of the whole continuation, in nats.
        greedy: whether each of its tokens is the most likely one.
        tokens: number of its tokens.
    """

    logprob: float
    greedy: bool
    tokens: int


@dataclass(frozen=True)
class Text:
    """Tokens of a text; those from index `first` on are scored."""

    tokens: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class _Tree:
    """The sequences of one item as one row.

    Attributes:
        item: index of the item.
        tokens: stem and branches, one after the other.
        positions: position of each token within its sequence.
        branches: branch of each token, -1 for the stem.
        before: for each scored token, the row index of its preceding token.
        targets: the scored tokens, sequence by sequence.
        counts: number of scored tokens of each sequence.
    """

    item: int
    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    branches: tuple[int, ...]
    before: tuple[int, ...]
    targets: tuple[int, ...]
    counts: tuple[int, ...]


def encode(tokenizer: Tokenizer, prefix: Sequence[int], context: str, continuation: str) -> Text:
    """Context and continuation as tokens.

    Args:
        tokenizer: as from `load_tokenizer`.
        prefix: token ids that every text begins with.
        context: the context; may be empty if the tokenizer adds a beginning-of-sequence token.
        continuation: the scored text.

    Raises:
        EvaluationError: no token precedes the continuation, or the continuation is empty.
    """
    stripped = context.rstrip()
    whole = text_tokens(tokenizer, prefix, context + continuation)
    first = len(text_tokens(tokenizer, prefix, stripped)) if stripped else 0
    tokens, first = (*prefix, *whole), len(prefix) + first
    if first == 0 or first >= len(tokens):
        raise EvaluationError(
            "an item cannot be scored",
            where=repr(context[-40:]),
            found=repr(continuation[:40])
            if first
            else "no context, and a tokenizer without a beginning-of-sequence token",
            fix="give the item a context and a continuation",
        )
    return Text(tokens, first)


def check_length(items: Sequence[Sequence[Text]], longest: int | None) -> None:
    """Check that a model can read every sequence; the last token of a sequence is only predicted.

    Args:
        items: the sequences of each item.
        longest: the model's context in tokens; None if its config.json does not say.

    Raises:
        EvaluationError: a sequence is longer than the context.
    """
    for sequence in (one for item in items for one in item):
        if longest is not None and len(sequence.tokens) - 1 > longest:
            raise EvaluationError(
                "an item is longer than the model's context",
                where="max_position_embeddings",
                found=f"{len(sequence.tokens) - 1} tokens, the context has {longest}",
                fix="leave the item's group or the task out of the suite for this model",
            )


@torch.inference_mode()
def likelihoods(
    model: PreTrainedModel,
    items: Sequence[Sequence[Text]],
    *,
    progress: Callable[[int, int], None] | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[tuple[Likelihood, ...]]:
    """Score every sequence of every item.

    Args:
        model: a causal language model.
        items: the sequences of each item, which may share a prefix.
        progress: called with the number of completed items and the total.
        batch_tokens: maximum tokens of a batch, including padding.

    Raises:
        EvaluationError: a sequence is longer than the model's context, or the model's predictions are not finite.
    """
    check_length(items, getattr(model.config, "max_position_embeddings", None))
    trees = sorted((_tree(index, item) for index, item in enumerate(items)), key=lambda tree: -len(tree.tokens))
    answers: list[tuple[Likelihood, ...]] = [()] * len(items)
    done = 0
    for batch in _batches(trees, batch_tokens):
        states = _states(model, batch)
        targets = torch.tensor([token for tree in batch for token in tree.targets], device=states.device)
        scores = score_states(model.get_output_embeddings(), states, targets)
        if not bool(torch.isfinite(scores.nll).all()):
            raise EvaluationError(
                "the model's predictions are not finite",
                where="logits",
                found=f"item {batch[0].item}",
                fix="an activation overflows its dtype: use bfloat16 in place of float16, or leave the layer unquantized",
            )
        parts = [count for tree in batch for count in tree.counts]
        by_sequence = zip(torch.split(scores.nll.double(), parts), torch.split(scores.correct, parts), strict=True)
        for tree in batch:
            found = [next(by_sequence) for _ in tree.counts]
            answers[tree.item] = tuple(
                Likelihood(-nll.sum().item(), bool(right.all()), len(nll)) for nll, right in found
            )
        done += len(batch)
        if progress is not None:
            progress(done, len(items))
    return answers


def _tree(item: int, sequences: Sequence[Text]) -> _Tree:
    shortest = min(len(sequence.tokens) for sequence in sequences)
    stem = 0
    while stem < shortest and len({sequence.tokens[stem] for sequence in sequences}) == 1:
        stem += 1
    tokens, positions = list(sequences[0].tokens[:stem]), list(range(stem))
    branches, before, targets = [-1] * stem, list[int](), list[int]()
    for number, sequence in enumerate(sequences):
        begin = len(tokens)
        for index in range(sequence.first, len(sequence.tokens)):
            before.append(index - 1 if index <= stem else begin + index - 1 - stem)
            targets.append(sequence.tokens[index])
        rest = sequence.tokens[stem:-1]  # the last token is not read: nothing after it is predicted
        tokens.extend(rest)
        positions.extend(range(stem, stem + len(rest)))
        branches.extend([number] * len(rest))
    counts = tuple(len(sequence.tokens) - sequence.first for sequence in sequences)
    return _Tree(item, tuple(tokens), tuple(positions), tuple(branches), tuple(before), tuple(targets), counts)


def _batches(trees: Sequence[_Tree], tokens: int) -> Iterator[Sequence[_Tree]]:
    """Split the trees, longest first, into batches of at most `tokens` tokens including padding."""
    start = 0
    while start < len(trees):
        rows = max(tokens // len(trees[start].tokens), 1)
        yield trees[start : start + rows]
        start += rows


def _states(model: PreTrainedModel, batch: Sequence[_Tree]) -> Tensor:
    """The final hidden states from which the scored tokens are predicted [t, H]."""
    longest = len(batch[0].tokens)
    shape = (len(batch), longest)
    ids, positions, branches = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    for row, tree in enumerate(batch):
        length = len(tree.tokens)
        ids[row, :length] = torch.tensor(tree.tokens)
        positions[row, :length] = torch.tensor(tree.positions)
        branches[row, :length] = torch.tensor(tree.branches)
    options = {}
    if any(len(tree.counts) > 1 for tree in batch):
        sees = (branches[:, None, :] == -1) | (branches[:, None, :] == branches[:, :, None])
        options = {
            "attention_mask": (sees & torch.ones(longest, longest, dtype=torch.bool).tril())[:, None].to(model.device),
            "position_ids": positions.to(model.device),
        }
    states = model.base_model(input_ids=ids.to(model.device), use_cache=False, **options).last_hidden_state
    return torch.cat([states[row, list(tree.before)] for row, tree in enumerate(batch)])
