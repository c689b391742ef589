"""The columns that do not depend on what a suite asks for."""

from typing import Literal

from quantlab.evaluation.record import Divergence, Measured
from quantlab.report.matrix.column import Column, Unit
from quantlab.report.matrix.rows import Row


def _divergence_column(field: str, heading: str, meaning: str, *, unit: Unit, better: Literal["low", "high"]) -> Column:
    def read(row: Row) -> Measured | None:
        found: Divergence | None = row.divergence
        value = getattr(found, field) if found else None
        return value if isinstance(value, Measured) else None

    return Column(
        key=f"divergence.{field}",
        field=f"quality.divergence.{field}",
        heading=heading,
        meaning=meaning,
        group="quality",
        unit=unit,
        read=read,
        better=better,
        relative=True,
    )


DIVERGENCE_COLUMNS = (
    _divergence_column(
        "kl_median",
        "KL median, nats",
        "Median over tokens of the KL divergence from the baseline.",
        unit="nats",
        better="low",
    ),
    _divergence_column(
        "kl_p99",
        "KL 99th %ile, nats",
        "99th percentile over tokens of the KL divergence from the baseline: the worst of a hundred.",
        unit="nats",
        better="low",
    ),
    _divergence_column(
        "flips_to_wrong",
        "right → wrong %",
        "Tokens that the baseline predicts rightly and the variant wrongly.",
        unit="share",
        better="low",
    ),
    _divergence_column(
        "flips_to_right",
        "wrong → right %",
        "Tokens that the variant predicts rightly and the baseline wrongly.",
        unit="share",
        better="high",
    ),
)

KV_CACHE = Column(
    key="kv_cache_bytes_per_token",
    field="memory.kv_cache_bytes_per_token",
    heading="cache per token",
    meaning="Bytes by which the runtime's cache grows with every token of a sequence, all layers together.",
    group="memory",
    unit="bytes",
    read=lambda row: row.kv_cache_bytes_per_token,
    better="low",
)

TWIN_MEMORY = Column(
    key="twin_memory_percent_of_fp16",
    field="speed.twin_memory_percent_of_fp16",
    heading="twin's memory %",
    meaning="Bytes a random-weight twin of real width holds for its weights, in percent of the same weights at two bytes each.",
    group="speed",
    unit="percent",
    read=lambda row: row.twin_memory_percent_of_fp16,
    better="low",
)

HEADLINE_COLUMNS = (
    Column(
        key="accuracy_loss_percent",
        field="quality.accuracy_loss_percent",
        heading="accuracy loss %",
        meaning="Next-token accuracy lost on held-out text, in percent of the baseline's. An interval that reaches zero shows no measurable loss.",
        group="quality",
        unit="change",
        read=lambda row: row.accuracy_loss_percent,
        better="low",
        relative=True,
    ),
    Column(
        key="memory_percent_of_fp16",
        field="memory.weights_bytes",
        heading="memory % of FP16",
        meaning="Bytes the runtime holds for all weights, scales included, in percent of the same weights at two bytes each.",
        group="memory",
        unit="percent",
        read=lambda row: row.memory_percent_of_fp16,
        better="low",
    ),
    Column(
        key="speed_over_fp16",
        field="speed.decode_over_fp16.1",
        heading="speed × FP16",
        meaning="Decode speed at batch size 1 over that of FP16, measured on a random-weight twin in runs interleaved with it.",
        group="speed",
        unit="ratio",
        read=lambda row: row.speed_over_fp16,
        better="high",
    ),
)

DETAILS_COLUMNS = (
    Column(
        key="perplexity_change_percent",
        field="quality.perplexity_change_percent",
        heading="perplexity change %",
        meaning="Change of perplexity against the baseline on the same tokens.",
        group="quality",
        unit="change",
        read=lambda row: row.perplexity_change_percent,
        better="low",
        relative=True,
    ),
    Column(
        key="kl_to_baseline",
        field="quality.kl_to_baseline",
        heading="KL, nats",
        meaning="Mean KL divergence of the predictions from the baseline's, per token, in nats.",
        group="quality",
        unit="nats",
        read=lambda row: row.kl_to_baseline,
        better="low",
        relative=True,
    ),
    Column(
        key="top1_agreement",
        field="quality.top1_agreement",
        heading="top-1 agreement %",
        meaning="Tokens for which baseline and variant hold the same next token most likely.",
        group="quality",
        unit="share",
        read=lambda row: row.top1_agreement,
        better="high",
        relative=True,
    ),
    Column(
        key="perplexity",
        field="quality.perplexity",
        heading="perplexity",
        meaning="Perplexity on held-out text.",
        group="quality",
        unit="plain",
        read=lambda row: row.perplexity,
        better="low",
    ),
    Column(
        key="next_token_accuracy",
        field="quality.next_token_accuracy",
        heading="accuracy %",
        meaning="Tokens whose most likely prediction was right.",
        group="quality",
        unit="share",
        read=lambda row: row.next_token_accuracy,
        better="high",
    ),
    Column(
        key="artifact_bytes",
        field="memory.artifact_bytes",
        heading="size on disk",
        meaning="Size of the artifact's shards, configuration and tokenizer, in powers of 1000.",
        group="memory",
        unit="bytes",
        read=lambda row: row.artifact_bytes,
        better="low",
    ),
    Column(
        key="weights_bytes",
        field="memory.weights_bytes",
        heading="weights",
        meaning="Bytes the runtime holds for weights, scales included.",
        group="memory",
        unit="bytes",
        read=lambda row: row.weights_bytes,
        better="low",
    ),
    Column(
        key="quantized_weights_percent_of_fp16",
        field="memory.quantized_weights_percent_of_fp16",
        heading="quantized part %",
        meaning="The same as memory % of FP16, of the quantized tensors only.",
        group="memory",
        unit="percent",
        read=lambda row: row.quantized_weights_percent_of_fp16,
        better="low",
    ),
    Column(
        key="peak_memory_bytes",
        field="memory.peak_memory_bytes",
        heading="peak memory",
        meaning="Most memory at once while the artifact is loaded and reads one window of text: of the whole process, libraries "
        "included, or of torch's allocator where a GPU computes.",
        group="memory",
        unit="bytes",
        read=lambda row: row.peak_memory_bytes,
        better="low",
        of_machine=True,
    ),
    Column(
        key="load_seconds",
        field="memory.load_seconds",
        heading="load, s",
        meaning="Seconds until the artifact is ready to compute.",
        group="memory",
        unit="seconds",
        read=lambda row: row.load_seconds_interval,
        better="low",
        of_machine=True,
    ),
)
