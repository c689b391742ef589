"""Metrics of memory: bytes on disk, in memory and of the cache, and the time until an artifact is ready."""

from typing import Annotated, Literal

from quantlab.evaluation.measured import Frozen, Measured
from quantlab.evaluation.metric import Metric


class Expanded(Frozen):
    """Quantized matrices that no kernel of the device multiplies by."""

    format: str
    """Name of their number format."""
    count: int
    """How many; matrices that the runtime holds as one, such as gate and up, count once."""
    reasons: tuple[str, ...]
    """Why each bank of the device declined."""
    held: Literal["packed", "dense"]
    """Whether they are stored small and expanded for every product, or expanded when loaded."""


class Memory(Frozen):
    """Bytes. The order of the fields is the order of the columns."""

    artifact_bytes: Annotated[
        int,
        Metric(
            heading="size on disk",
            meaning="Size of the artifact's shards, configuration and tokenizer, in powers of 1000.",
            unit="bytes",
            better="low",
            tables=("main",),
            head="size\non disk",
            rank=4,
            always=True,
        ),
    ]
    weights_bytes: Annotated[
        int,
        Metric(
            heading="weights",
            meaning="Bytes the runtime holds for weights, scales included.",
            unit="bytes",
            better="low",
            always=True,
        ),
    ]
    fp16_weights_bytes: Annotated[
        int,
        Metric(
            heading="weights at 16 bits",
            meaning="The same weights at two bytes each.",
            unit="bytes",
            better="low",
            tables=(),
        ),
    ]
    quantized_weights_percent_of_fp16: Annotated[
        float | None,
        Metric(
            heading="quantized part %",
            meaning="The same as memory % of FP16, of the quantized tensors only.",
            unit="percent",
            better="low",
            always=True,
            claim="quantized weights in memory, % of FP16",
        ),
    ]
    """Of the tensors that were quantized only, scales included; None where none was."""
    peak_memory_bytes: Annotated[
        int,
        Metric(
            heading="peak memory",
            meaning="Most memory at once while the artifact is loaded and reads one window of text: of the whole process, "
            "libraries included, or of torch's allocator where a GPU computes.",
            unit="bytes",
            better="low",
            tables=("main", "cards"),
            head="peak\nmemory",
            rank=6,
            always=True,
            of_machine=True,
        ),
    ]
    """Of a process that loaded the artifact at its own dtype."""
    peak_memory_of: Literal["process", "cuda"] = "process"
    """Which memory that is: the resident size of the process, libraries included, or what torch's allocator held on the GPU."""
    load_seconds: Annotated[
        Measured,
        Metric(
            heading="load, s",
            meaning="Seconds until the artifact is ready to compute.",
            unit="seconds",
            better="low",
            tables=("main",),
            head="load\ns",
            rank=7,
            always=True,
            of_machine=True,
        ),
    ]
    kv_cache_bytes_per_token: Annotated[
        int | None,
        Metric(
            heading="cache per token",
            meaning="Bytes by which the runtime's cache grows with every token of a sequence, all layers together.",
            unit="bytes",
            better="low",
            tables=("details", "cards"),
        ),
    ] = None
    """At the dtype it is served at."""
    kv_cache: str = ""
    """Its contents: "latent of 128 + 32 bfloat16 values, 8 layers"."""

    expanded: tuple[Expanded, ...] = ()
    """The fallbacks of the runtime, by format and reason; empty where kernels multiply by every quantized matrix."""

    @property
    def memory_percent_of_fp16(
        self,
    ) -> Annotated[
        float | None,
        Metric(
            heading="memory % of FP16",
            meaning="Bytes the runtime holds for all weights, scales included, in percent of the same weights at two bytes each.",
            unit="percent",
            better="low",
            tables=("headline", "main", "cards", "leaderboard"),
            head="memory\n% of FP16",
            always=True,
            origin="weights_bytes",
            claim="weights in memory, % of FP16",
        ),
    ]:
        """None for a model without weights."""
        return 100 * self.weights_bytes / self.fp16_weights_bytes if self.fp16_weights_bytes > 0 else None
