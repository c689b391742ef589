"""Quality: an artifact's predictions on held-out text, and their difference from the baseline's on the same tokens."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantlab.errors import EvaluationError
from quantlab.evaluation.manifest import kept_experts, read_manifest
from quantlab.evaluation.measured import Frozen, Measured, Significance
from quantlab.evaluation.metric import Metric, metrics_of
from quantlab.evaluation.processes.messages import Progress, QualityRequest, QualityResult
from quantlab.evaluation.quality.baseline import Baseline, BaselineWriter, TokenScores
from quantlab.evaluation.quality.layers import (
    LayerErrors,
    RouteRecorder,
    layer_errors,
    same_experts,
    sample,
    save_routes,
    save_states,
)
from quantlab.evaluation.quality.metrics import SUMS, Divergence, Documents, Domain, Quality
from quantlab.evaluation.quality.predictions import score
from quantlab.evaluation.quality.windows import HeldOut, held_out_text
from quantlab.evaluation.statistics import Floats, Resampled, percentile, resample
from quantlab.evaluation.suite import load_suite
from quantlab.runtime.cpu_operators import cpu_operators
from quantlab.runtime.load import load

_AT: Final = {name: column for column, name in enumerate(SUMS)}
"""Column index of each sum in a table of sums."""


def measure_quality(request: QualityRequest, progress: Progress) -> QualityResult:
    """Load an artifact and score the held-out text.

    Raises:
        QuantlabError: the artifact, its tokenizer or the text cannot be used.
    """
    text = load_suite(request.suite, held_out=request.held_out)
    suite = text.suite.text
    progress("loading", 0, 0)
    held_out = held_out_text(text, request.directory)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[suite.dtype]
    model = load(request.directory, dtype=dtype, device=request.device)
    windows = sample(held_out, model, text.suite.layer_error_tokens)
    scored = lambda done, total: progress("scoring", done, total)  # noqa: E731 - only fixes the stage's name
    with RouteRecorder(model, kept_experts(read_manifest(request.directory))) as routes:
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
        quality = with_layers(quality, held_out, same_experts(request.predictions, routes.by_layer()), errors)
        assert quality.divergence is not None, "compared with a baseline"
        divergence = quality.divergence.model_copy(update={"predictions_bytes": baseline.nbytes})
        quality = quality.model_copy(update={"divergence": divergence})
        return QualityResult(quality=quality, failures=errors.faults() if errors is not None else {})
    if request.role == "baseline":
        save_routes(request.predictions, routes.by_layer())
        save_states(request.predictions, model, windows)
    alone = summarise(held_out, scores, None, compute_dtype=suite.dtype)
    return QualityResult(quality=_with_operators(alone, request), failures={})


def _with_operators(quality: Quality, request: QualityRequest) -> Quality:
    return quality.model_copy(update={"operators": cpu_operators() if request.device == "cpu" else ()})


def summarise(held_out: HeldOut, scores: TokenScores, baseline: TokenScores | None, *, compute_dtype: str) -> Quality:
    """The numbers of a record from the scores of tokens.

    Raises:
        EvaluationError: the perplexity overflows a float.
    """
    table = document_sums(held_out, scores, baseline)
    seen = table[:, _AT["tokens"]] > 0
    compared = baseline is not None
    everything = resample(table[seen], held_out.strata[seen])
    domains = {}
    for stratum, name in enumerate(held_out.domains):
        rows = seen & (held_out.strata == stratum)
        domains[name] = Domain.model_validate(
            _numbers(Domain, resample(table[rows], held_out.strata[rows]), compared=compared)
        )
    return Quality(
        compute_dtype=compute_dtype,
        domains=domains,
        divergence=_divergence(held_out, scores, everything) if compared else None,
        significance=_significance(everything) if compared else {},
        documents=_documents(held_out, table, compared=compared),
        **_numbers(Quality, everything, compared=compared),
    )


def _numbers(model: type[Frozen], sums: Resampled, *, compared: bool) -> dict[str, Any]:
    """All numbers of a part of the record that are functions of sums. Without a baseline, numbers relative to it are None."""
    _refuse_infinite_perplexity(sums)
    return {
        name: _measure(sums, declared.metric) if compared or not declared.metric.relative else None
        for name, declared in metrics_of(model).items()
        if name in model.model_fields and declared.metric.statistic is not None
    }


def _measure(sums: Resampled, metric: Metric) -> Measured | None:
    """One number with its interval; None if a draw of documents divides by zero, for example if the baseline is never right."""
    statistic = _of_columns(metric)
    with np.errstate(divide="ignore", invalid="ignore"):
        if np.isfinite(sums.draws).all() and not np.isfinite(statistic(sums.draws)).all():
            return None
    return sums.measure(statistic, n=int(sums.totals[_AT[metric.count]]))


def _of_columns(metric: Metric) -> Callable[[Floats], Floats]:
    """The metric's function of named sums, as a function of the columns of a table of sums [..., C]."""
    statistic = metric.statistic
    assert statistic is not None, "only called for functions of sums"
    return lambda row: statistic({name: row[..., at] for name, at in _AT.items()})


def _documents(held_out: HeldOut, table: Floats, *, compared: bool) -> Documents:
    """The sums of the scored documents, in the form of the record."""
    seen = table[:, _AT["tokens"]] > 0
    kept = SUMS if compared else ("tokens", "bytes", "nll", "correct")
    # counts are integers in the record: pydantic accepts whole floats for them
    return Documents.model_validate(
        {
            "tokens_sha256": held_out.sha256,
            "domain": tuple(held_out.domains[stratum] for stratum in held_out.strata[seen]),
            **{name: table[seen, _AT[name]].tolist() for name in kept},
        }
    )


def _divergence(held_out: HeldOut, scores: TokenScores, sums: Resampled) -> Divergence:
    assert scores.kl is not None, "scored against a baseline"
    kl, n = scores.kl.double().numpy(), held_out.tokens
    document = held_out.documents()[:: scores.stride]
    of_quality = _numbers(Quality, sums, compared=True)
    return Divergence(
        kl_sample=f"all {n:,} tokens" if scores.stride == 1 else f"one in {scores.stride} of {n:,} tokens",
        kl_mean=of_quality["kl_to_baseline"],
        kl_median=percentile(kl, document, held_out.strata, share=0.5),
        kl_p99=percentile(kl, document, held_out.strata, share=0.99),
        top1_agreement=of_quality["top1_agreement"],
        **_numbers(Divergence, sums, compared=True),
    )


def _significance(sums: Resampled) -> dict[str, Significance]:
    """The significance of every metric that declares a loss, by metric name."""
    metrics, found = metrics_of(Quality), {}
    for name, declared in metrics.items():
        if declared.metric.loss is not None:
            tested = metrics[declared.metric.loss.tested].metric
            _, significance = sums.compare(_of_columns(tested), n=int(sums.totals[_AT[tested.count]]))
            if significance is not None:
                found[name] = significance
    return found


def with_layers(
    quality: Quality, held_out: HeldOut, agreement: Mapping[str, NDArray[np.bool_]], errors: LayerErrors | None
) -> Quality:
    """Add the routers' agreement and the layer errors to the quality.

    Args:
        quality: quality with a comparison with the baseline.
        held_out: the scored text.
        agreement: layer -> whether each token is routed to the baseline's experts [T].
        errors: errors of the single layers; None if they were not measured.
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
    """Norm of the difference over norm of the layer's contribution, with intervals over documents; only for layers without fault."""
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
    """Sums of each document, in the order of `SUMS` [D, C]; without a baseline the sums that need it are zero."""
    document = held_out.documents()
    documents = len(held_out.strata)

    def by_document(values: Tensor) -> Floats:
        weights: Floats = values.double().numpy()
        sums: Floats = np.bincount(document, weights=weights, minlength=documents).astype(np.float64)
        return sums

    table = np.zeros((documents, len(SUMS)))
    table[:, _AT["tokens"]] = np.bincount(document, minlength=documents)
    windows = [window.document for window in held_out.windows]
    table[:, _AT["bytes"]] = np.bincount(
        windows, weights=[window.nbytes for window in held_out.windows], minlength=documents
    )
    table[:, _AT["nll"]] = by_document(scores.nll)
    table[:, _AT["correct"]] = by_document(scores.correct)
    if baseline is not None and scores.kl is not None:
        kept = document[:: scores.stride]
        table[:, _AT["kl"]] = np.bincount(kept, weights=scores.kl.double().numpy(), minlength=documents)
        table[:, _AT["kl_tokens"]] = np.bincount(kept, minlength=documents)
        table[:, _AT["agreeing"]] = by_document(scores.top1 == baseline.top1)
        table[:, _AT["baseline_nll"]] = by_document(baseline.nll)
        table[:, _AT["baseline_correct"]] = by_document(baseline.correct)
        table[:, _AT["to_wrong"]] = by_document(baseline.correct & ~scores.correct)
        table[:, _AT["to_right"]] = by_document(scores.correct & ~baseline.correct)
    return table


def _refuse_infinite_perplexity(sums: Resampled) -> None:
    if sums.draws[:, _AT["nll"]].max() / sums.draws[:, _AT["tokens"]].min() > math.log(np.finfo(np.float64).max):
        raise EvaluationError(
            "the artifact's perplexity overflows",
            where="held-out text",
            found=f"{sums.totals[_AT['nll']] / sums.totals[_AT['tokens']]:.0f} nats per token",
            fix="check the artifact with `quantlab verify`, then its variant in the recipe",
        )
