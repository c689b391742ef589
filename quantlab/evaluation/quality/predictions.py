"""Predictions of a model at every token of held-out text, compared with the baseline's.

The final hidden states are computed per batch of windows. Logits are computed for a few hundred tokens at a time, few enough to
stay in the CPU's cache. For every token they give the logsumexp (computed once, for both the token's probability and the KL), the
most likely token and, with the baseline's logits a, p = softmax(a), and the model's logits b, q = softmax(b),

    KL(p || q) = sum_v p_v (log p_v - log q_v) = sum_v p_v (a_v - b_v) - lse(a) + lse(b),

which needs one exponential per side. Windows are padded on the right. Attention is causal, so padding does not affect the tokens
before it and no mask is needed. Activations are quantized per token, so padding does not change their scales either.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantlab.errors import EvaluationError
from quantlab.evaluation.quality.baseline import Baseline, BaselineWriter, TokenScores
from quantlab.evaluation.quality.layers import RouteRecorder
from quantlab.evaluation.quality.windows import HeldOut, Window

BATCH_TOKENS = 4096
_CHUNK_LOGITS = 1 << 21  # 8 MiB of float32
_FEWEST_CHUNK_TOKENS = 64


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    held_out: HeldOut,
    *,
    baseline: Baseline | None = None,
    keep: BaselineWriter | None = None,
    progress: Callable[[int, int], None] | None = None,
    routes: RouteRecorder | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> TokenScores:
    """Score every token of the windows, in their order.

    Args:
        model: a causal language model.
        held_out: the windows.
        baseline: the baseline's predictions to compare with.
        keep: stores this model's predictions as those of the baseline.
        progress: called with the number of scored tokens and the total.
        routes: records the experts of every scored token.
        batch_tokens: maximum tokens of a batch, including padding.

    Raises:
        EvaluationError: the model's predictions are not finite, or the baseline's head is not a plain matrix.
    """
    head = model.get_output_embeddings()
    if keep is not None:
        keep.begin(_head_weight(head), tokens=held_out.tokens)
    parts: list[TokenScores] = []
    done = 0
    for windows in held_out.batches(batch_tokens):
        hidden = _hidden_states(model, windows)
        if routes is not None:
            routes.record(_scored_positions(windows))
        targets = torch.cat([torch.from_numpy(window.tokens[window.first :]) for window in windows])
        span = slice(done, done + len(targets))
        if keep is not None:
            keep.write(hidden)
        parts.extend(_score_batch(head, hidden, targets, baseline, span))
        done = span.stop
        if progress is not None:
            progress(done, held_out.tokens)
    scores = joined(parts)
    _check_finite(scores)
    if keep is not None:
        keep.finish(scores)
    return scores


def _hidden_states(model: PreTrainedModel, windows: Sequence[Window]) -> Tensor:
    """The final hidden states from which the scored tokens of `windows` are predicted [t, H]."""
    longest = max(len(window.tokens) for window in windows)
    ids = torch.zeros(len(windows), longest, dtype=torch.int64)
    for row, window in enumerate(windows):
        ids[row, : len(window.tokens)] = torch.from_numpy(window.tokens)
    states = model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    return torch.cat([states[row, window.first - 1 : len(window.tokens) - 1] for row, window in enumerate(windows)])


def _scored_positions(windows: Sequence[Window]) -> Tensor:
    """Positions of the states of `_hidden_states` in the padded batch, as indices into its flattened rows [t]."""
    longest = max(len(window.tokens) for window in windows)
    parts = [
        torch.arange(window.first - 1, len(window.tokens) - 1) + row * longest for row, window in enumerate(windows)
    ]
    return torch.cat(parts)


def _score_batch(
    head: torch.nn.Module, hidden: Tensor, targets: Tensor, baseline: Baseline | None, span: slice
) -> list[TokenScores]:
    """Scores of one batch in chunks.

    Args:
        head: maps hidden states to logits.
        hidden: final hidden states [t, H].
        targets: the next tokens [t], on any device.
        baseline: the baseline's predictions to compare with.
        span: range of the batch among all scored tokens.
    """
    targets = targets.to(hidden.device)
    vocabulary = head(hidden[:1]).shape[-1]
    size = max(_CHUNK_LOGITS // vocabulary, _FEWEST_CHUNK_TOKENS)
    parts = []
    for start in range(0, len(targets), size):
        stop = min(start + size, len(targets))
        logits = head(hidden[start:stop]).float()
        target = targets[start:stop]
        lse = _logsumexp(logits)
        top1 = logits.argmax(dim=-1)
        nll = lse - logits.gather(1, target[:, None])[:, 0]
        kl, stride = None, 1
        if baseline is not None:
            offsets, states = baseline.read(slice(span.start + start, span.start + stop))
            reference = torch.nn.functional.linear(states, baseline.head).float()
            stride = baseline.stride
            if stride > 1:  # the same products on the same rows, so that equal models have equal logits
                logits = head(hidden[start:stop][offsets]).float()
                lse_of_kept, reference_lse = _logsumexp(logits), _logsumexp(reference)
            else:
                lse_of_kept, reference_lse = (
                    lse,
                    baseline.scores.lse[span.start + start : span.start + stop].to(lse.device),
                )
            kl = divergence(reference, reference_lse, logits, lse_of_kept)
        parts.append(TokenScores(nll, top1, lse, top1 == target, kl, stride))
    return parts


def score_states(head: torch.nn.Module, hidden: Tensor, targets: Tensor) -> TokenScores:
    """Scores of the tokens `targets` [t], predicted from the final hidden states `hidden` [t, H]."""
    return joined(_score_batch(head, hidden, targets, None, slice(0, len(targets))))


def joined(parts: Sequence[TokenScores]) -> TokenScores:
    """Concatenate scores, on the CPU."""
    kl = [part.kl for part in parts if part.kl is not None]
    return TokenScores(
        nll=torch.cat([part.nll for part in parts]).cpu(),
        top1=torch.cat([part.top1 for part in parts]).cpu(),
        lse=torch.cat([part.lse for part in parts]).cpu(),
        correct=torch.cat([part.correct for part in parts]).cpu(),
        kl=torch.cat(kl).cpu() if kl else None,
        stride=parts[0].stride,
    )


def divergence(reference: Tensor, reference_lse: Tensor, logits: Tensor, lse: Tensor) -> Tensor:
    """KL(reference || model) of each token, in nats [t]. Overwrites both logits.

    Args:
        reference: the reference's logits [t, V].
        reference_lse: their logsumexp [t].
        logits: the model's logits [t, V].
        lse: their logsumexp [t].
    """
    difference = torch.sub(reference, logits, out=logits)
    probabilities = reference.sub_(reference_lse[:, None]).exp_()
    kl = probabilities.mul_(difference).sum(dim=-1) - reference_lse + lse
    return kl.clamp_(min=0)  # negative values are rounding errors of about 1e-7; a NaN stays NaN and is refused later


def _logsumexp(logits: Tensor) -> Tensor:
    """logsumexp over the last dimension, with two passes over memory fewer than torch's."""
    largest = logits.amax(dim=-1, keepdim=True)
    return (logits - largest).exp_().sum(dim=-1).log_() + largest[:, 0]


def _head_weight(head: torch.nn.Module) -> Tensor:
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise EvaluationError(
            "the baseline's predictions cannot be stored: its head is not a plain matrix",
            where="lm_head",
            found=type(head).__name__,
            fix="choose a baseline whose lm_head is not quantized",
        )
    return head.weight


def _check_finite(scores: TokenScores) -> None:
    bad = int((~torch.isfinite(scores.nll)).sum())
    if scores.kl is not None:
        bad = max(bad, int((~torch.isfinite(scores.kl)).sum()))
    if bad:
        raise EvaluationError(
            "the model's predictions are not finite",
            where="logits",
            found=f"{bad} of {len(scores.nll)} tokens",
            fix="an activation overflows its dtype: use bfloat16 in place of float16, or leave the layer unquantized",
        )
