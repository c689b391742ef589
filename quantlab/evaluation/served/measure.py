"""The served path: an artifact decoded in 16 bits, step by step, against the same artifact computed in float32.

Quality is measured in float32 on whole windows of text. A user's model runs differently: 16-bit activations, a KV cache, one new
token per step, fused kernels, CUDA graphs. Here the artifact is loaded in its own dtype with `runtime.load` and decoded with
`Decoder`, as for a user:

- **Teacher-forced.** The decoder reads a prefix of held-out text, one sequence at a time, and steps through the following tokens
  of the text. The logits of each step are compared with the float32 logits of the same artifact at the same position:
  KL(float32 || served) and top-1 agreement. Both are also compared with the baseline's stored predictions, so that the loss of
  the served model stands beside the loss of the quality columns.
- **Greedy.** The decoder continues all prompts as one batch, greedily. The greedy agreement is the share of tokens before the
  first one that differs from the float32 artifact's continuation. After that token the contexts differ, so equal tokens mean
  nothing. Before it both have the same context, so one float32 pass over the served text finds it.

The 16-bit model and the float32 model are in memory one after the other. Prompts are read by transformers' own code, so only the
logits of steps are compared, not those of prompts.

Legend: S sequences, T tokens, V vocabulary, G tokens decoded greedily.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from quantlab.errors import EvaluationError
from quantlab.evaluation.measured import Measured
from quantlab.evaluation.processes.messages import Progress, ServedRequest
from quantlab.evaluation.quality.baseline import Baseline
from quantlab.evaluation.quality.predictions import divergence
from quantlab.evaluation.quality.windows import HeldOut, held_out_text
from quantlab.evaluation.served.metrics import Served
from quantlab.evaluation.statistics import Floats, resample
from quantlab.evaluation.suite import ServedSuite, load_suite
from quantlab.runtime.decode import Decoder
from quantlab.runtime.load import load

_KL, _AGREEING, _BASELINE_KL, _FLOAT32_BASELINE_KL, _BASELINE_TOKENS, _TOKENS = range(6)
_COLUMNS: Final = 6


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a window of held-out text.

    Attributes:
        document: index of the document it comes from.
        tokens: token ids [T]; the last one is only predicted.
        prefix: number of tokens read as the prompt; the decoder steps through the rest except the last.
        first: index of the prediction of the first step among all scored tokens of the held-out text.
    """

    document: int
    tokens: Tensor
    prefix: int
    first: int

    @property
    def steps(self) -> int:
        return len(self.tokens) - 1 - self.prefix


@dataclass(frozen=True)
class Decoded:
    """The decoder's output.

    Attributes:
        logits: logits of every step of every sequence [steps, V], in the model's dtype, on the CPU.
        greedy: prompts with their continuations [S, T + G].
        greedy_tokens: length of the continuations, G.
        dtype: dtype of the model.
        path: how the decoder ran its steps.
    """

    logits: tuple[Tensor, ...]
    greedy: Tensor
    greedy_tokens: int
    dtype: torch.dtype
    path: str


def measure_served(request: ServedRequest, progress: Progress) -> Served:
    """Decode held-out text with an artifact in its own dtype and compare with its float32 logits and the baseline's.

    Raises:
        QuantlabError: the artifact, its tokenizer or the text cannot be used, the float32 model does not fit into memory, or its
            logits are not finite.
    """
    loaded = load_suite(request.suite, held_out=request.held_out)
    suite, text = loaded.suite.served, loaded.suite.text
    held_out = held_out_text(loaded, request.directory)
    excerpts = choose(held_out, suite)
    progress("loading", 0, 0)
    model = load(request.directory, device=request.device)
    decoded = decode(model, excerpts, suite, progress)
    del model  # only one model in memory at a time
    gc.collect()
    progress("loading in float32", 0, 0)
    model = load(request.directory, dtype=torch.float32, device=request.device)
    baseline = None
    if request.predictions is not None:
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[text.dtype]
        baseline = Baseline(request.predictions, tokens_sha256=held_out.sha256, dtype=dtype, device=model.device)
    sums = compare(model, excerpts, decoded, baseline)
    shares = greedy_shares(model, decoded.greedy, decoded.greedy_tokens)
    strata = held_out.strata[[excerpt.document for excerpt in excerpts]]
    return summarise(sums, shares, strata, decoded)


def choose(held_out: HeldOut, suite: ServedSuite) -> tuple[Excerpt, ...]:
    """Choose beginnings of windows of different documents, evenly spaced among all, the longest first.

    A window that is too short for the suite's prefix and steps is used whole; its first half is the prompt.
    """
    found: dict[int, Excerpt] = {}
    start = 0
    for window in held_out.windows:
        tokens = window.tokens[: suite.prefix + suite.steps + 1]
        whole = len(tokens) > suite.prefix + suite.steps
        prefix = suite.prefix if whole else max(len(tokens) // 2, window.first)
        if window.document not in found and prefix < len(tokens) - 1:
            first = start + prefix + 1 - window.first
            found[window.document] = Excerpt(window.document, torch.from_numpy(tokens), prefix, first)
        start += window.scored
    excerpts = list(found.values())
    every = max(len(excerpts) // suite.sequences, 1)
    return tuple(excerpts[::every][: suite.sequences])


@torch.inference_mode()
def decode(model: PreTrainedModel, excerpts: Sequence[Excerpt], suite: ServedSuite, progress: Progress) -> Decoded:
    """Step through every excerpt separately, then continue all prompts as one batch.

    Args:
        model: the 16-bit model, as a user loads it.
        excerpts: the text.
        suite: number of greedily decoded tokens.
        progress: called with the number of completed steps.

    Raises:
        EvaluationError: logits are not finite.
    """
    longest = int(model.config.max_position_embeddings)
    decoder = Decoder(model, batch=1, length=max(len(excerpt.tokens) for excerpt in excerpts))
    total, done = sum(excerpt.steps for excerpt in excerpts), 0
    logits: list[Tensor] = []
    for excerpt in excerpts:
        decoder.prefill(excerpt.tokens[None, : excerpt.prefix])
        rows = [
            decoder.step(token.to(model.device)).clone()  # a captured step overwrites its logits
            for token in excerpt.tokens[excerpt.prefix : -1]
        ]
        logits.append(torch.cat(rows).cpu())
        done += len(rows)
        progress("decoding", done, total + suite.greedy_tokens)
    bad = sum(int((~torch.isfinite(rows)).any(dim=1).sum()) for rows in logits)
    if bad:
        raise EvaluationError(
            "the logits of the served model are not finite",
            where=f"decoding in {str(model.dtype).removeprefix('torch.')}, {decoder.path}",
            found=f"{bad} of {total} steps",
            fix="an activation overflows its dtype: use bfloat16 in place of float16, or leave the layer unquantized",
        )
    length = min(min(excerpt.prefix for excerpt in excerpts), longest - suite.greedy_tokens)
    prompts = torch.stack([excerpt.tokens[:length] for excerpt in excerpts])
    batch = Decoder(model, batch=len(prompts), length=length + suite.greedy_tokens)
    greedy = batch.generate(prompts, suite.greedy_tokens).cpu()
    progress("decoding", total + suite.greedy_tokens, total + suite.greedy_tokens)
    path = decoder.path if decoder.not_fused is None else f"{decoder.path}, not fused: {decoder.not_fused}"
    return Decoded(tuple(logits), greedy, suite.greedy_tokens, model.dtype, path)


@torch.inference_mode()
def compare(model: PreTrainedModel, excerpts: Sequence[Excerpt], decoded: Decoded, baseline: Baseline | None) -> Floats:
    """Sums over the steps of every excerpt [S, C].

    Args:
        model: the same artifact in float32.
        excerpts: the text.
        decoded: the decoder's output.
        baseline: the baseline's predictions; None for the baseline itself, or if there are none.
    """
    head = model.get_output_embeddings()
    ids = torch.zeros(len(excerpts), max(len(excerpt.tokens) for excerpt in excerpts) - 1, dtype=torch.int64)
    for row, excerpt in enumerate(excerpts):  # attention is causal: padding after a text does not affect it
        ids[row, : len(excerpt.tokens) - 1] = excerpt.tokens[:-1]
    states = model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    table = np.zeros((len(excerpts), _COLUMNS))
    for row, (excerpt, served) in enumerate(zip(excerpts, decoded.logits, strict=True)):
        exact = head(states[row, excerpt.prefix : len(excerpt.tokens) - 1]).float()
        found = served.to(model.device).float()
        table[row, _TOKENS] = len(found)
        table[row, _KL] = _kl(exact, found)
        table[row, _AGREEING] = float((exact.argmax(dim=-1) == found.argmax(dim=-1)).sum())
        if baseline is not None:
            at, kept = baseline.read(slice(excerpt.first, excerpt.first + len(found)))
            reference = torch.nn.functional.linear(kept, baseline.head).float()
            table[row, _BASELINE_TOKENS] = len(at)
            table[row, _BASELINE_KL] = _kl(reference, found[at])
            table[row, _FLOAT32_BASELINE_KL] = _kl(reference, exact[at])
    return table


def _kl(reference: Tensor, logits: Tensor) -> float:
    """Sum over rows of KL(reference || logits), both [t, V], in nats."""
    return float(
        divergence(reference.clone(), reference.logsumexp(-1), logits.clone(), logits.logsumexp(-1)).double().sum()
    )


@torch.inference_mode()
def greedy_shares(model: PreTrainedModel, texts: Tensor, count: int) -> Floats:
    """For every prompt, the share of `count` tokens before the first one that the float32 model would not have chosen [S].

    Args:
        model: the same artifact in float32.
        texts: prompts with their continuations [S, T + G].
        count: length of the continuations, G.
    """
    ids = texts.to(model.device)
    states = model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[:, -count:]
    equal = model.get_output_embeddings()(states).argmax(dim=-1) == ids[:, -count:]
    shares: Floats = equal.cumprod(dim=1).double().mean(dim=1).cpu().numpy()
    return shares


def summarise(sums: Floats, shares: Floats, strata: NDArray[np.int64], decoded: Decoded) -> Served:
    """The numbers of a record, with intervals over documents.

    Args:
        sums: sums of every excerpt, from `compare` [S, C].
        shares: greedy share of every excerpt, from `greedy_shares` [S].
        strata: domain of every excerpt [S].
        decoded: the decoder's output.
    """
    resampled, tokens = resample(sums, strata), int(sums[:, _TOKENS].sum())
    kept = int(sums[:, _BASELINE_TOKENS].sum())

    def mean(column: int, over: int, n: int) -> Measured:
        return resampled.measure(lambda row: row[..., column] / row[..., over], n=n)

    continued = resample(np.stack([shares, np.ones_like(shares)], axis=1), strata)
    return Served(
        served_kl=mean(_KL, _TOKENS, tokens),
        greedy_agreement=continued.measure(
            lambda row: row[..., 0] / row[..., 1], n=len(shares) * decoded.greedy_tokens
        ),
        served_top1_agreement=mean(_AGREEING, _TOKENS, tokens),
        served_kl_to_baseline=mean(_BASELINE_KL, _BASELINE_TOKENS, kept) if kept else None,
        float32_kl_to_baseline=mean(_FLOAT32_BASELINE_KL, _BASELINE_TOKENS, kept) if kept else None,
        served_dtype=str(decoded.dtype).removeprefix("torch."),
        served_steps=decoded.path,
    )
