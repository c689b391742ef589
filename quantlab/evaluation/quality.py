"""Quality: what an artifact predicts on held-out text, and how far it is from the baseline on the same tokens."""

import math

import numpy as np
import torch
from torch import Tensor

from quantlab.errors import EvaluationError
from quantlab.evaluation.baseline import Baseline, BaselineWriter, TokenScores
from quantlab.evaluation.jobs import Progress, QualityRequest
from quantlab.evaluation.predictions import score
from quantlab.evaluation.record import Domain, Measured, Quality
from quantlab.evaluation.statistics import Floats, Resampled, resample
from quantlab.evaluation.suite import load_suite
from quantlab.evaluation.text import HeldOut, cut, load_tokenizer, read_corpus
from quantlab.runtime.load import load

# the sums over documents that every number of the table is made of
_COLUMNS = ("tokens", "bytes", "nll", "correct", "kl", "agreeing", "baseline_nll", "baseline_correct")
_TOKENS, _BYTES, _NLL, _CORRECT, _KL, _AGREEING, _BASELINE_NLL, _BASELINE_CORRECT = range(len(_COLUMNS))


def measure_quality(request: QualityRequest, progress: Progress) -> Quality:
    """Load an artifact and score the held-out text.

    Raises:
        QuantlabError: the artifact, its tokenizer or the text cannot be used.
    """
    text = load_suite(request.suite)
    suite = text.suite.text
    progress("loading", 0, 0)
    tokenizer, prefix = load_tokenizer(request.directory)
    held_out = cut(
        read_corpus(text.corpus), tokenizer, prefix, length=suite.length, tokens_per_domain=suite.tokens_per_domain
    )
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[suite.dtype]
    model = load(request.directory, dtype=dtype)
    scored = lambda done, total: progress("scoring", done, total)  # noqa: E731 - the stage's name and nothing else
    if request.role == "compared":
        with Baseline(request.predictions, tokens_sha256=held_out.sha256, dtype=dtype) as baseline:
            scores = score(model, held_out, baseline=baseline, progress=scored)
        return summarise(held_out, scores, baseline.scores, compute_dtype=suite.dtype)
    keep = None
    if request.role == "baseline":
        keep = BaselineWriter(request.predictions, key=request.key, tokens_sha256=held_out.sha256)
    scores = score(model, held_out, keep=keep, progress=scored)
    return summarise(held_out, scores, None, compute_dtype=suite.dtype)


def summarise(held_out: HeldOut, scores: TokenScores, baseline: TokenScores | None, *, compute_dtype: str) -> Quality:
    """The numbers of a record from the scores of tokens.

    Raises:
        EvaluationError: the perplexity is larger than a number can be.
    """
    table = document_sums(held_out, scores, baseline)
    seen = table[:, _TOKENS] > 0
    everything = resample(table[seen], held_out.strata[seen])
    n = int(everything.totals[_TOKENS])
    domains = {}
    for stratum, name in enumerate(held_out.domains):
        rows = seen & (held_out.strata == stratum)
        one = resample(table[rows], held_out.strata[rows])
        tokens = int(one.totals[_TOKENS])
        domains[name] = Domain(perplexity=_perplexity(one), bits_per_byte=one.measure(_bits_per_byte, n=tokens))
    compared = everything if baseline is not None else None
    return Quality(
        compute_dtype=compute_dtype,
        perplexity=_perplexity(everything),
        bits_per_byte=everything.measure(_bits_per_byte, n=n),
        next_token_accuracy=everything.measure(lambda sums: sums[..., _CORRECT] / sums[..., _TOKENS], n=n),
        domains=domains,
        perplexity_change_percent=compared and compared.measure(_perplexity_change, n=n),
        accuracy_loss_percent=compared and _accuracy_loss(compared, n),
        kl_to_baseline=compared and compared.measure(lambda sums: sums[..., _KL] / sums[..., _TOKENS], n=n),
        top1_agreement=compared and compared.measure(lambda sums: sums[..., _AGREEING] / sums[..., _TOKENS], n=n),
    )


def document_sums(held_out: HeldOut, scores: TokenScores, baseline: TokenScores | None) -> Floats:
    """What each document adds to each column [D, C]; the columns that need a baseline are zero without one."""
    counts = [window.scored for window in held_out.windows]
    document = np.repeat([window.document for window in held_out.windows], counts)
    documents = len(held_out.strata)

    def by_document(values: Tensor) -> Floats:
        weights: Floats = values.double().numpy()
        sums: Floats = np.bincount(document, weights=weights, minlength=documents).astype(np.float64)
        return sums

    table = np.zeros((documents, len(_COLUMNS)))
    table[:, _TOKENS] = np.bincount(document, minlength=documents)
    windows = [window.document for window in held_out.windows]
    table[:, _BYTES] = np.bincount(windows, weights=[window.nbytes for window in held_out.windows], minlength=documents)
    table[:, _NLL] = by_document(scores.nll)
    table[:, _CORRECT] = by_document(scores.correct)
    if baseline is not None and scores.kl is not None:
        table[:, _KL] = by_document(scores.kl)
        table[:, _AGREEING] = by_document(scores.top1 == baseline.top1)
        table[:, _BASELINE_NLL] = by_document(baseline.nll)
        table[:, _BASELINE_CORRECT] = by_document(baseline.correct)
    return table


def _perplexity(sums: Resampled) -> Measured:
    """exp(mean negative log-likelihood per token)."""
    if sums.draws[:, _NLL].max() / sums.draws[:, _TOKENS].min() > math.log(np.finfo(np.float64).max):
        raise EvaluationError(
            "the artifact predicts nothing: its perplexity is larger than a number can be",
            where="held-out text",
            found=f"{sums.totals[_NLL] / sums.totals[_TOKENS]:.0f} nats per token",
            fix="check the artifact with `quantlab verify`, then its variant in the recipe",
        )
    return sums.measure(lambda row: np.exp(row[..., _NLL] / row[..., _TOKENS]), n=int(sums.totals[_TOKENS]))


def _bits_per_byte(sums: Floats) -> Floats:
    return sums[..., _NLL] / math.log(2) / sums[..., _BYTES]


def _perplexity_change(sums: Floats) -> Floats:
    return 100 * np.expm1((sums[..., _NLL] - sums[..., _BASELINE_NLL]) / sums[..., _TOKENS])


def _accuracy_loss(sums: Resampled, n: int) -> Measured | None:
    """100 (correct of baseline - correct) / correct of baseline; None where the baseline is never right."""
    if sums.draws[:, _BASELINE_CORRECT].min() == 0:
        return None

    def loss(row: Floats) -> Floats:
        return 100 * (row[..., _BASELINE_CORRECT] - row[..., _CORRECT]) / row[..., _BASELINE_CORRECT]

    return sums.measure(loss, n=n)
