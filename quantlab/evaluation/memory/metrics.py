"""Metrics of memory: bytes on disk, in memory and of the cache, and the time until an artifact is ready."""

from typing import Annotated, Literal

from quantlab.evaluation.measured import Frozen, Measured
from quantlab.evaluation.metric import Metric


class Expanded(Frozen):
    """Quantized matrices for which no kernel of the device exists."""

    format: str
    """Name of their number format."""
    count: int
    """Number of matrices; matrices that the runtime fuses, such as gate and up, count once."""
    reasons: tuple[str, ...]
    """Why each bank of the device declined."""
    held: Literal["packed", "dense"]
    """packed: expanded for every product; dense: expanded when loaded."""


class Memory(Frozen):
    """Memory of an artifact, in bytes. The order of the fields is the order of the columns."""

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
            meaning="Memory % of FP16 of the quantized tensors only.",
            unit="percent",
            better="low",
            always=True,
            claim="quantized weights in memory, % of FP16",
        ),
    ]
    """Of the quantized tensors only, including scales; None if there are none."""
    peak_memory_bytes: Annotated[
        int,
        Metric(
            heading="peak memory",
            meaning="Peak memory while the artifact is loaded and reads one window of text: of the whole process including "
            "libraries, or of torch's allocator on a GPU.",
            unit="bytes",
            better="low",
            tables=("main", "cards"),
            head="peak\nmemory",
            rank=6,
            always=True,
            of_machine=True,
        ),
    ]
    """Of a process that loaded the artifact in its own dtype."""
    peak_memory_of: Literal["process", "cuda"] = "process"
    """Kind of memory: the resident size of the process including libraries, or the memory of torch's allocator on the GPU."""
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
    """In the dtype in which the artifact is served."""
    kv_cache: str = ""
    """Its contents: "latent of 128 + 32 bfloat16 values, 8 layers"."""

    expanded: tuple[Expanded, ...] = ()
    """The runtime's fallbacks, by format and reason; empty if kernels exist for every quantized matrix."""

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
