"""What a suite asks of a checkpoint's tokenizer and context, tried without its weights.

A suite that does not fit the checkpoint would fail in every cell, hours later. Its text is cut into windows here and its tasks are
encoded, as the cells will do.
"""

from pathlib import Path

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
        EvaluationError: the text cannot be read, a domain has too few documents, or a window, a continuation or an item is longer
            than the context.
        CheckpointError: there is no usable tokenizer, or it cannot encode the text.
    """
    if context:
        _check_windows(suite, context)
    held_out_text(suite, directory)
    tokenizer, prefix = load_tokenizer(directory)
    for run in suite.runs:
        if run.wanted.ours:
            items = suite.tasks[run.wanted.task].drawn(run.wanted.items, run.seed)
            texts = [[encode(tokenizer, prefix, item.context, choice) for choice in item.choices] for item in items]
            check_length(texts, context or None)


def _check_windows(suite: LoadedSuite, context: int) -> None:
    text, greedy = suite.suite.text.length, suite.suite.served.greedy_tokens
    if text > context:
        raise EvaluationError(
            "a window of held-out text is longer than the model's context",
            where=f"{suite.path}, text.length",
            found=f"{text} tokens, max_position_embeddings is {context}",
            fix=f"use a suite with a `length` of at most {context}",
        )
    if greedy >= context:
        raise EvaluationError(
            "a greedy continuation is longer than the model's context",
            where=f"{suite.path}, served.greedy_tokens",
            found=f"{greedy} tokens after a prompt, max_position_embeddings is {context}",
            fix=f"use a suite with at most {context - 1} `greedy_tokens`",
        )
