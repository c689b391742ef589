"""What a suite asks of a checkpoint's tokenizer and context, tried without its weights.

A suite that does not fit the checkpoint would fail in every cell, hours later. Its text is cut into windows here and its tasks are
encoded, as the cells will do.
"""

from pathlib import Path

from quantlab.architectures.config import size_of
from quantlab.checkpoint.tokenizer import load_tokenizer
from quantlab.errors import EvaluationError
from quantlab.evaluation.quality.windows import held_out_text
from quantlab.evaluation.suite import LoadedSuite
from quantlab.evaluation.tasks.likelihood import check_length, encode


def check_suite_text(suite: LoadedSuite, directory: Path, context: int) -> None:
    """Check that the held-out text and the offline tasks of a suite can be read by a checkpoint.

    Args:
        suite: the suite.
        directory: the source checkpoint, with its tokenizer.
        context: the model's context in tokens, 0 if its config.json does not state it.

    Raises:
        EvaluationError: the text cannot be read, a domain has too few documents, or a window, a continuation, a timed decode
            or an item is longer than the context.
        CheckpointError: there is no usable tokenizer, or it cannot encode the text.
    """
    _check_lengths(suite, context)
    held_out_text(suite, directory)
    tokenizer, prefix = load_tokenizer(directory)
    for run in suite.runs:
        if run.wanted.ours:
            items = suite.tasks[run.wanted.task].drawn(run.wanted.items, run.seed)
            texts = [[encode(tokenizer, prefix, item.context, choice) for choice in item.choices] for item in items]
            check_length(texts, context or None)


def check_same_tokens(suite: LoadedSuite, directory: Path, peer: Path) -> None:
    """Check that the tokenizers of two checkpoints cut the held-out text into the same tokens, without which nothing can be compared.

    Args:
        suite: the suite.
        directory: the source checkpoint.
        peer: another tool's.

    Raises:
        EvaluationError: they do not.
        CheckpointError: there is no usable tokenizer.
    """
    if held_out_text(suite, directory).sha256 != held_out_text(suite, peer).sha256:
        raise EvaluationError(
            "a peer and the recipe's model read the same text as different tokens",
            where=str(peer),
            found="the tokenizers differ",
            fix=f"give a directory with the tokenizer files of {directory}",
        )


def _check_lengths(suite: LoadedSuite, context: int) -> None:
    """Raise an error if a measurement reads more tokens than its model's context."""
    served, speed = suite.suite.served, suite.suite.speed
    lengths = [
        ("a window of held-out text", "text.length", suite.suite.text.length, context),
        ("a prompt with its greedy continuation", "served.greedy_tokens", 1 + served.greedy_tokens, context),
    ]
    if speed is not None:
        timed = size_of(speed.shape, "max_position_embeddings", default=0) if speed.shape else context
        lengths.append(("a timed decode", "speed.prompt + speed.steps", speed.prompt + speed.steps, timed))
    for what, field, tokens, longest in lengths:
        if longest and tokens > longest:
            raise EvaluationError(
                f"{what} is longer than the model's context",
                where=f"{suite.path}, {field}",
                found=f"{tokens} tokens, max_position_embeddings is {longest}",
                fix=f"use a suite with at most {longest} tokens there",
            )
