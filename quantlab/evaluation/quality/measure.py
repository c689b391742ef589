"""Quality: what an artifact predicts on held-out text, and how far it is from the baseline on the same tokens."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantlab.checkpoint.tokenizer import load_tokenizer
from quantlab.errors import EvaluationError
from quantlab.evaluation.manifest import kept_experts, read_manifest
from quantlab.evaluation.processes.messages import Progress, QualityRequest, QualityResult
from quantlab.evaluation.quality.baseline import Baseline, BaselineWriter, TokenScores
from quantlab.evaluation.quality.layers import (
    LayerErrors,
    Routes,
    agreeing,
    keep_routes,
    keep_states,
    layer_errors,
    sample,
)
from quantlab.evaluation.quality.predictions import score
from quantlab.evaluation.quality.windows import HeldOut, cut, read_corpus
from quantlab.evaluation.record import Divergence, Documents, Domain, Measured, Quality, Significance
from quantlab.evaluation.statistics import Floats, Resampled, percentile, resample
from quantlab.evaluation.suite import load_suite
from quantlab.runtime.load import load
from quantlab.runtime.operators import cpu_operators

# the sums over documents that every number of the table is made of
_TOKENS, _BYTES, _NLL, _CORRECT, _KL, _AGREEING, _BASELINE_NLL, _BASELINE_CORRECT, _TO_WRONG, _TO_RIGHT = range(10)
_KL_TOKENS = 10  # those whose KL is known
_COLUMNS = 11


def measure_quality(request: QualityRequest, progress: Progress) -> QualityResult:
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
    model = load(request.directory, dtype=dtype, device=request.device)
    windows = sample(held_out, model, text.suite.layer_error_tokens)
    scored = lambda done, total: progress("scoring", done, total)  # noqa: E731 - the stage's name and nothing else
    with Routes(model, kept_experts(read_manifest(request.directory))) as routes:
        if request.role == "compared":
            baseline = Baseline(request.predictions, tokens_sha256=held_out.sha256, dtype=dtype, device=model.device)
            scores = score(model, held_out, baseline=baseline, progress=scored, routes=routes)
        else:
            keep = None
            if request.role == "baseline":
                keep = BaselineWriter(
                    request.predictions,
                    key=request.key,
                    tokens_sha256=held_out.sha256,
                    most_bytes=suite.predictions_bytes,
                )
            scores = score(model, held_out, keep=keep, progress=scored, routes=routes)
    if request.role == "compared":
        quality = _with_operators(summarise(held_out, scores, baseline.scores, compute_dtype=suite.dtype), request)
        errors = layer_errors(request.predictions, model, windows)
        quality = with_layers(quality, held_out, agreeing(request.predictions, routes.found()), errors)
        assert quality.divergence is not None, "compared with a baseline"
        divergence = quality.divergence.model_copy(update={"predictions_bytes": baseline.nbytes})
        quality = quality.model_copy(update={"divergence": divergence})
        return QualityResult(quality=quality, failures=errors.faults() if errors is not None else {})
    if request.role == "baseline":
        keep_routes(request.predictions, routes.found())
        keep_states(request.predictions, model, windows)
    alone = summarise(held_out, scores, None, compute_dtype=suite.dtype)
    return QualityResult(quality=_with_operators(alone, request), failures={})


def _with_operators(quality: Quality, request: QualityRequest) -> Quality:
    return quality.model_copy(update={"operators": cpu_operators() if request.device == "cpu" else ()})


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
        if baseline is not None:
            change = one.measure(_perplexity_change, n=tokens), _mean_kl(one)
            domains[name] = domains[name].model_copy(
                update={"perplexity_change_percent": change[0], "kl_to_baseline": change[1]}
            )
    compared = everything if baseline is not None else None
    return Quality(
        compute_dtype=compute_dtype,
        perplexity=_perplexity(everything),
        bits_per_byte=everything.measure(_bits_per_byte, n=n),
        next_token_accuracy=everything.measure(_mean_of(_CORRECT), n=n),
        domains=domains,
        perplexity_change_percent=compared and compared.measure(_perplexity_change, n=n),
        accuracy_loss_percent=compared and _accuracy_loss(compared, n),
        accuracy_loss=compared and compared.measure(_accuracy_difference, n=n),
        kl_to_baseline=compared and _mean_kl(compared),
        top1_agreement=compared and compared.measure(_mean_of(_AGREEING), n=n),
        divergence=_divergence(held_out, scores, baseline, everything) if baseline is not None else None,
        significance=_significance(compared, n) if compared is not None else {},
        documents=_documents(held_out, table, compared=baseline is not None),
    )


def _documents(held_out: HeldOut, table: Floats, *, compared: bool) -> Documents:
    """The sums as a record keeps them: of the documents that were scored."""
    seen = table[:, _TOKENS] > 0

    def counts(column: int) -> tuple[int, ...]:
        return tuple(int(value) for value in table[seen, column])

    def sums(column: int) -> tuple[float, ...]:
        return tuple(float(value) for value in table[seen, column])

    return Documents(
        tokens_sha256=held_out.sha256,
        domain=tuple(held_out.domains[stratum] for stratum in held_out.strata[seen]),
        tokens=counts(_TOKENS),
        nll=sums(_NLL),
        correct=counts(_CORRECT),
        kl=sums(_KL) if compared else (),
        agreeing=counts(_AGREEING) if compared else (),
        to_wrong=counts(_TO_WRONG) if compared else (),
        to_right=counts(_TO_RIGHT) if compared else (),
        baseline_nll=sums(_BASELINE_NLL) if compared else (),
        baseline_correct=counts(_BASELINE_CORRECT) if compared else (),
    )


def _divergence(held_out: HeldOut, scores: TokenScores, baseline: TokenScores, sums: Resampled) -> Divergence:
    assert scores.kl is not None, "scored against a baseline"
    kl, n = scores.kl.double().numpy(), held_out.tokens
    document = held_out.documents()[:: scores.stride]
    sample = f"all {n:,} tokens" if scores.stride == 1 else f"one in {scores.stride} of {n:,} tokens"
    return Divergence(
        kl_sample=sample,
        kl_mean=_mean_kl(sums),
        kl_median=percentile(kl, document, held_out.strata, share=0.5),
        kl_p99=percentile(kl, document, held_out.strata, share=0.99),
        top1_agreement=sums.measure(_mean_of(_AGREEING), n=n),
        flips_to_wrong=sums.measure(_mean_of(_TO_WRONG), n=n),
        flips_to_right=sums.measure(_mean_of(_TO_RIGHT), n=n),
    )


def _significance(sums: Resampled, n: int) -> dict[str, Significance]:
    """Accuracy is tested as a difference of shares: it is zero exactly when the loss in percent is."""
    found = {
        "perplexity_change_percent": sums.compare(_perplexity_change, n=n)[1],
        "accuracy_loss_percent": sums.compare(_accuracy_difference, n=n)[1],
    }
    return {name: significance for name, significance in found.items() if significance is not None}


def with_layers(
    quality: Quality, held_out: HeldOut, agreement: Mapping[str, NDArray[np.bool_]], errors: LayerErrors | None
) -> Quality:
    """The quality with what each layer does.

    Args:
        quality: compared with a baseline.
        held_out: what was scored.
        agreement: layer -> whether the tokens go to the baseline's experts [T].
        errors: of each layer alone, None where they were not measured.
    """
    assert quality.divergence is not None, "compared with a baseline"
    document, documents = held_out.documents(), len(held_out.strata)
    counts = np.bincount(document, minlength=documents)
    columns = [counts, *(np.bincount(document, weights=same, minlength=documents) for same in agreement.values())]
    seen = counts > 0
    sums = resample(np.stack(columns, axis=1).astype(np.float64)[seen], held_out.strata[seen])
    router = {
        name: sums.measure(lambda row, at=at: row[..., at] / row[..., 0], n=held_out.tokens)  # type: ignore[misc]
        for at, name in enumerate(agreement, start=1)
    }
    update: dict[str, object] = {"router_agreement": router}
    if errors is not None:
        update |= {"layer_errors": _relative(errors), "layer_error_tokens": errors.tokens}
    return quality.model_copy(update={"divergence": quality.divergence.model_copy(update=update)})


def _relative(errors: LayerErrors) -> dict[str, Measured]:
    """Norm of the difference over norm of what the layer adds, with intervals over documents; of layers where both are numbers."""
    faults = errors.faults()
    sound = [at for at, name in enumerate(errors.layers) if name not in faults]
    if not sound:
        return {}
    by_window = np.hstack([errors.difference[:, sound], errors.added[:, sound]])
    documents, document = np.unique(errors.documents, return_inverse=True)
    table = np.zeros((len(documents), by_window.shape[1]))
    np.add.at(table, document, by_window)
    sums = resample(table, np.zeros(len(table), dtype=np.int64))

    def error(at: int) -> Callable[[Floats], Floats]:
        return lambda row: np.sqrt(row[..., at] / row[..., at + len(sound)])

    return {errors.layers[layer]: sums.measure(error(at), n=errors.tokens) for at, layer in enumerate(sound)}


def document_sums(held_out: HeldOut, scores: TokenScores, baseline: TokenScores | None) -> Floats:
    """What each document adds to each column [D, C]; the columns that need a baseline are zero without one."""
    document = held_out.documents()
    documents = len(held_out.strata)

    def by_document(values: Tensor) -> Floats:
        weights: Floats = values.double().numpy()
        sums: Floats = np.bincount(document, weights=weights, minlength=documents).astype(np.float64)
        return sums

    table = np.zeros((documents, _COLUMNS))
    table[:, _TOKENS] = np.bincount(document, minlength=documents)
    windows = [window.document for window in held_out.windows]
    table[:, _BYTES] = np.bincount(windows, weights=[window.nbytes for window in held_out.windows], minlength=documents)
    table[:, _NLL] = by_document(scores.nll)
    table[:, _CORRECT] = by_document(scores.correct)
    if baseline is not None and scores.kl is not None:
        kept = document[:: scores.stride]
        table[:, _KL] = np.bincount(kept, weights=scores.kl.double().numpy(), minlength=documents)
        table[:, _KL_TOKENS] = np.bincount(kept, minlength=documents)
        table[:, _AGREEING] = by_document(scores.top1 == baseline.top1)
        table[:, _BASELINE_NLL] = by_document(baseline.nll)
        table[:, _BASELINE_CORRECT] = by_document(baseline.correct)
        table[:, _TO_WRONG] = by_document(baseline.correct & ~scores.correct)
        table[:, _TO_RIGHT] = by_document(scores.correct & ~baseline.correct)
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


def _mean_kl(sums: Resampled) -> Measured:
    """Over the tokens it is known of."""
    return sums.measure(lambda row: row[..., _KL] / row[..., _KL_TOKENS], n=int(sums.totals[_KL_TOKENS]))


def _mean_of(column: int) -> Callable[[Floats], Floats]:
    return lambda sums: sums[..., column] / sums[..., _TOKENS]


def _accuracy_difference(sums: Floats) -> Floats:
    return (sums[..., _BASELINE_CORRECT] - sums[..., _CORRECT]) / sums[..., _TOKENS]


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
