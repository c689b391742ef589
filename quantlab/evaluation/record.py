"""A record: everything measured of one artifact, as the file that tables are built from.

A record stands alone: what was measured, on what, with which versions and how uncertain each number is. `report` reads
records and nothing else. Later versions may add fields; they do not rename these.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from quantlab.errors import ArtifactError

FEWEST_DEGREES = 10
"""Of freedom, for an interval of a number of documents: documents less the domains they are of."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Measured(_Frozen):
    """A number with its 95 % interval, or the range it was found in, and the count it rests on."""

    value: float
    low: float
    high: float
    n: int
    interval: Literal["95 %", "range"] = "95 %"
    """What `low` and `high` are: a 95 % interval, or only the least and the most that was found, where that was too little for one."""
    reason: str = ""
    """Why it is a range, and of what: "3 repetitions", "5 documents"; empty for a 95 % interval."""

    @model_serializer(mode="wrap")
    def _plain(self, inner: SerializerFunctionWrapHandler) -> dict[str, object]:
        """A 95 % interval is written with the four keys that every reader of a record or a matrix knows."""
        written: dict[str, object] = inner(self)
        return written if self.interval == "range" else {name: written[name] for name in ("value", "low", "high", "n")}


Verdict = Literal["no measurable loss", "loss", "gain"]
"""What a paired difference to the baseline says. "no measurable loss": its 95 % interval covers zero, or its `holm_p` is above 0.05."""


LEVEL = 0.05
"""Of significance, as a 95 % interval has it."""


class Significance(_Frozen):
    """Whether a difference to the baseline could be chance.

    `p` is two-sided. Where it comes from the bootstrap it inverts the interval that stands beside it: the interval leaves
    zero out exactly when p < 0.05. `holm_p` corrects for a table's having many rows: of all rows that truly lose nothing,
    the chance that even one has holm_p <= 0.05 is 5 % (S. Holm 1979, "A simple sequentially rejective multiple test procedure").
    """

    p: float
    holm_p: float | None = None
    """p adjusted over the rows of the matrix that have this number; None until all of them are measured."""
    verdict: Verdict
    """Decided once, when all rows of the matrix are known; tables and recommendations read it here."""


def verdict(loss: Measured, holm_p: float | None = None) -> Verdict:
    """What a paired loss, positive where the artifact is worse, says.

    Args:
        loss: with its 95 % interval.
        holm_p: its p adjusted over the rows of a matrix, once all of them are known; above 0.05 the loss could be chance.
    """
    if loss.low <= 0 <= loss.high or (holm_p is not None and holm_p > LEVEL):
        return "no measurable loss"
    return "loss" if loss.low > 0 else "gain"


class Domain(_Frozen):
    """Held-out text of one kind."""

    perplexity: Measured
    bits_per_byte: Measured
    perplexity_change_percent: Measured | None = None
    """Relative to the baseline, as in `Quality`."""
    kl_to_baseline: Measured | None = None
    """Mean per token, in nats."""


class Divergence(_Frozen):
    """How far the artifact's predictions are from the baseline's on the same tokens, and where in the model that begins."""

    kl_mean: Measured
    """Mean over tokens of KL(baseline || artifact), in nats, as are the next two; the same as `Quality.kl_to_baseline`."""
    kl_sample: str = ""
    """Tokens that the KL is taken on, evenly spaced: "all 19,380 tokens", "one in 3 of 160,000 tokens"."""
    predictions_bytes: int = 0
    """That the baseline's predictions take on disk."""
    kl_median: Measured
    kl_p99: Measured
    """99th percentile: how bad the worst of a hundred tokens is."""
    top1_agreement: Measured
    """Share of tokens on which both predict the same."""
    flips_to_wrong: Measured
    """Share of tokens that the baseline predicts rightly and the artifact wrongly."""
    flips_to_right: Measured
    """Share of tokens that the artifact predicts rightly and the baseline wrongly."""
    router_agreement: dict[str, Measured] = {}
    """By layer ("layer 3"): share of tokens sent to the same set of experts as in the baseline; empty without routers."""
    layer_errors: dict[str, Measured] = {}
    """By layer: relative error of what the layer adds to the hidden states, when it is given the baseline's own hidden states:
    the Frobenius norm of the difference of both models' outputs over that of the baseline's output less input. A layer at
    fault stands out, because no error of the layers before it reaches it. Measured on `layer_error_tokens` tokens."""
    layer_error_tokens: int = 0


class MatrixErrors(_Frozen):
    """What the making of the artifact did to the matrices of one kind in one layer, as the artifact's manifest says."""

    layer: str
    """Block as the manifest names it: "layer 3"."""
    kind: str
    """Name of the matrices without layer and expert: "mlp.experts.gate_proj"."""
    count: int
    """Matrices that were changed."""
    relative_error: float
    """Median over the matrices of the Frobenius norm of the change over that of the weight."""
    relative_error_max: float
    output_error: float | None = None
    """Median of squared error over squared outputs on the calibration text; None where no activations were read."""
    output_error_max: float | None = None
    worst: str = ""
    """The matrix with the largest output error (relative error where there is none)."""
    fallbacks: dict[str, int] = {}
    """What was done in place of what the recipe asks for, and for how many matrices."""


class Documents(_Frozen):
    """Sums over the scored tokens of each document, so that two records can be compared on the same text. One entry a document."""

    tokens_sha256: str
    """Hash of the tokens that were scored."""
    domain: tuple[str, ...]
    tokens: tuple[int, ...]
    nll: tuple[float, ...]
    """Minus log-probability, in nats, as is `kl`."""
    correct: tuple[int, ...]
    """Tokens whose most likely prediction was right."""
    kl: tuple[float, ...] = ()
    """KL(baseline || artifact); empty for the baseline itself, as are the rest."""
    agreeing: tuple[int, ...] = ()
    """Tokens on which artifact and baseline predict the same."""
    to_wrong: tuple[int, ...] = ()
    to_right: tuple[int, ...] = ()
    baseline_nll: tuple[float, ...] = ()
    baseline_correct: tuple[int, ...] = ()


class Quality(_Frozen):
    """How well the artifact predicts held-out text, and how far it is from the baseline on the same tokens."""

    compute_dtype: str
    """Dtype of the activations while this was measured."""
    operators: tuple[str, ...] = ()
    """Kernels that computed on the CPU, and every substitute for one that is wrong or missing there; empty on a GPU."""
    perplexity: Measured
    bits_per_byte: Measured
    next_token_accuracy: Measured
    """Share of tokens whose most likely prediction was right."""
    domains: dict[str, Domain]
    perplexity_change_percent: Measured | None
    """Relative to the baseline; None for the baseline itself and where the baseline failed, as are the next three."""
    accuracy_loss_percent: Measured | None
    """Next-token accuracy lost, in percent of the baseline's; also None where the baseline is never right."""
    kl_to_baseline: Measured | None
    """Mean KL(baseline || artifact) per token, in nats."""
    top1_agreement: Measured | None
    """Share of tokens on which both predict the same."""
    divergence: Divergence | None = None
    """None for the baseline itself and where the baseline failed."""
    accuracy_loss: Measured | None = None
    """The same as `accuracy_loss_percent`, as a difference of shares."""
    significance: dict[str, Significance] = {}
    """Of `perplexity_change_percent` and `accuracy_loss_percent`, by these names; empty for the baseline."""
    documents: Documents | None = None
    """What all of this is made of; None in records of earlier versions."""


TaskKey = tuple[str, str, int]
"""Name, metric and seed: what tells the results of one record apart."""


class TaskResult(_Frozen):
    """One task: a score, and what of it was lost against the baseline on the same items."""

    name: str
    """As the suite names it: "continuation", "arc_challenge"."""
    version: str
    """Of the task's data and construction; scores of different versions cannot be compared."""
    source: Literal["quantlab", "lm-eval"] = "quantlab"
    """Who defines the task."""
    metric: str
    """ "accuracy", "exact_match" …"""
    higher_is_better: bool = True
    score: Measured
    """In the metric's own unit; shares from 0 to 1. The interval is over documents, or over items where these stand alone."""
    n: int
    """Items."""
    random_baseline: float | None = None
    """Score of guessing; None where guessing has no meaning."""
    baseline_score: float | None = None
    """Score of the baseline; None for the baseline itself, as are the rest."""
    loss: Measured | None = None
    """How much worse than the baseline on the same items, in the metric's unit (0.01: one percentage point); positive is worse."""
    to_wrong: int | None = None
    """Items that the baseline answers rightly and the artifact wrongly; None where a metric is not right or wrong."""
    to_right: int | None = None
    """Items that the artifact answers rightly and the baseline wrongly."""
    significance: Significance | None = None
    """McNemar's exact test of the flips where items are right or wrong, else from the bootstrap; the verdict is the loss's."""
    by_group: dict[str, Measured] = {}
    """Score within groups of items: length of the context, kind of sentence; empty where there is one group."""
    decoding: str = ""
    """How an answer is taken: "log-likelihood", "greedy, at most 256 tokens"."""
    shots: int = 0
    """Solved examples before each item."""
    seed: int = 0
    """Of what is drawn: order of items, examples."""
    data_sha256: str = ""
    """Hash of the task's definition and items; empty for tasks whose data the harness fetches."""
    document_items: tuple[int, ...] = ()
    """Items of each document, in an order that depends on the items alone; empty in records of earlier versions."""
    document_scores: tuple[float, ...] = ()
    """Sum of their scores."""

    @property
    def key(self) -> TaskKey:
        """A record may hold several metrics and seeds of one task."""
        return self.name, self.metric, self.seed


class Expanded(_Frozen):
    """Quantized matrices that no kernel of the device multiplies by."""

    format: str
    """Name of their number format."""
    count: int
    """How many; matrices that the runtime holds as one, such as gate and up, count once."""
    reasons: tuple[str, ...]
    """Why each bank of the device declined."""
    held: Literal["packed", "dense"]
    """Whether they are stored small and expanded for every product, or expanded when loaded."""


class Memory(_Frozen):
    """Bytes."""

    weights_bytes: int
    """What the runtime holds for weights, scales included."""
    fp16_weights_bytes: int
    """The same weights at two bytes each."""
    quantized_weights_percent_of_fp16: float | None
    """Of the tensors that were quantized only, scales included; None where none was."""
    artifact_bytes: int
    """Size on disk of the artifact's shards, configuration and tokenizer."""
    peak_memory_bytes: int
    """Most memory at once of a process that loaded the artifact at its own dtype and read one window of text."""
    peak_memory_of: Literal["process", "cuda"] = "process"
    """Which memory that is: the resident size of the process, libraries included, or what torch's allocator held on the GPU."""
    load_seconds: Measured
    kv_cache_bytes_per_token: int | None = None
    """What the runtime's cache grows by with each token of a sequence, all layers together, at the dtype it is served at."""
    kv_cache: str = ""
    """What that is made of: "latent of 128 + 32 bfloat16 values, 8 layers"."""
    expanded: tuple[Expanded, ...] = ()
    """The fallbacks of the runtime, by format and reason; empty where kernels multiply by every quantized matrix."""


class Speed(_Frozen):
    """Tokens per second of a random-weight twin, interleaved with the FP16 twin. Keys are batch sizes.

    An interval says where another evaluation on the same machine finds the number, 19 times in 20.
    """

    twin: str
    """What was timed: width, layers and context of the twin."""
    layout: str
    """In which layout: "int4_g128 on 95 % of the weights, the rest bfloat16"."""
    twin_memory_percent_of_fp16: float | None = None
    """Bytes the twin holds for its weights, scales included, in percent of the same weights at two bytes each."""
    processes: int = 1
    """In how many processes it was timed; each number is the mean of their medians, its n counts the rounds of all."""
    decode_tokens_per_second: dict[str, Measured]
    prefill_tokens_per_second: dict[str, Measured]
    decode_over_fp16: dict[str, Measured]
    prefill_over_fp16: dict[str, Measured]
    time_to_first_token_seconds: dict[str, Measured] = {}
    """From a prompt in hand to its first new token, on the twin."""
    energy_joules_per_token: dict[str, Measured] | None = None
    """Of decoding; None where the device does not report its energy."""
    quartiles: dict[str, tuple[float, float]] = {}
    """First and third quartile over rounds, by cell: "decode_tokens_per_second.1"."""
    not_fused: str | None = None
    """Why decode steps ran transformers' forward functions; "" where steps were fused, None in records of earlier versions."""
    noise: dict[str, str] = {}
    """Why a cell cannot be taken for a fact, by cell as in `quartiles`: "other processes took 0.9 of 2 cores". A cell that is not
    named was measured in quiet."""


class AttentionCell(_Frozen):
    """One implementation of attention at one length of context, one sequence, on a random-weight twin."""

    implementation: str
    """ "quantlab_latent_sdpa", "sdpa", "eager", "flash_attention_2"."""
    context: int
    """Tokens."""
    prefill_peak_bytes: int | None = None
    """Most memory above the weights while the context is read, the cache included; None where it was not measured, as are the rest."""
    decode_peak_bytes: int | None = None
    """The same while a token is decoded after it; also None where a process cannot tell its latest peak from an earlier one."""
    cache_bytes: int | None = None
    """What the cache holds of the context."""
    prefill_tokens_per_second: Measured | None = None
    decode_tokens_per_second: Measured | None = None
    """Step by step, with a cache that grows."""
    quartiles: dict[str, tuple[float, float]] = {}
    """First and third quartile over repeats, by "prefill_tokens_per_second" and "decode_tokens_per_second"; empty without repeats."""
    noise: dict[str, str] = {}
    """Why a rate cannot be taken for a fact, by the same names."""
    reason: str | None = None
    """Why it was not measured: "not tried: about 211.5 GB needed, 16.0 GB free"."""


class Attention(_Frozen):
    """What a long context takes beyond the weights, and how fast it is, by implementation of attention."""

    twin: str
    """What was measured: width and layers of the twin."""
    layout: str
    """Its weights; empty where nothing could be measured."""
    memory: Literal["process", "cuda"]
    """Which memory the peaks are of, as in `Memory.peak_memory_of`."""
    cells: tuple[AttentionCell, ...]


class Calibrated(_Frozen):
    """Where and how precisely the artifact's calibration computed."""

    device: str
    """ "cpu" or "cuda"."""
    gpu: str
    """Its name, empty on the CPU."""
    cpu: str
    """The processor's name."""
    dtype: str
    """Of weights and activations: "float32" or "bfloat16"."""


class Made(_Frozen):
    """What made the artifact, as its manifest says."""

    code: str
    """Fingerprint of the code."""
    versions: dict[str, str]
    """Of the libraries whose arithmetic decided numbers."""
    calibration: Calibrated | None = None
    """None where nothing was calibrated."""


class Failure(_Frozen):
    """A measurement that could not be made."""

    cell: Literal["quality", "memory", "speed", "tasks"]
    reason: str


class Record(_Frozen):
    """One evaluation of one artifact."""

    schema_version: Literal[1] = 1
    recipe: str
    recipe_sha256: str
    variant: str
    description: str
    """The passes in one line, for people: "int4_g128 (rtn)"."""
    artifact: str
    """Directory of the artifact, relative to the run's directory; the checkpoint's own for `source`."""
    artifact_sha256: str
    """Hash of the artifact's manifest; of the checkpoint's configuration and weights for `source`."""
    baseline: str
    """The variant that losses are relative to."""
    baseline_sha256: str = ""
    """Its `artifact_sha256`."""
    suite: str
    """Name and version of the suite."""
    suite_sha256: str
    """Hash of the suite, of the text and of the tasks it names."""
    suite_name: str = ""
    """Name and version apart, as in `suite`; a leaderboard mixes no two versions in a column."""
    suite_version: int = 0
    seeds: dict[str, int] = {}
    """Every seed a number depends on, by what it draws: "bootstrap", "speed twin", "task continuation"."""
    command: str = ""
    """What was run: "quantlab run recipes/quickstart.yaml"."""
    hardware: str
    versions: dict[str, str]
    made: Made | None = None
    """What made the artifact; None for `source`, and for artifacts whose manifest does not say."""
    code: dict[str, str] = {}
    """Fingerprint of the code that measured each part, by cell: "quality", "tasks" …; a part is measured again after its code has changed."""
    environment: dict[str, str] = {}
    """Variables of the environment that choose instructions and kernels: `ONEDNN_MAX_CPU_ISA`, `QUANTLAB_NATIVE` …, where they were set."""
    quality: Quality | None
    memory: Memory | None
    speed: Speed | None
    failures: tuple[Failure, ...]
    tokens_per_expert: dict[str, tuple[int, ...]] = {}
    """Calibration tokens of every routed expert by block, as the artifact's manifest has them; empty where none was watched."""
    tasks: tuple[TaskResult, ...] = ()
    """In the order of the suite."""
    attention: Attention | None = None
    """Of the suite's contexts; in the record of the baseline only, None where the suite asks for none."""
    matrix_errors: tuple[MatrixErrors, ...] = ()
    """Of the matrices that were changed, by layer and kind; empty where nothing was, or the manifest does not say."""


def read_record(path: Path) -> Record:
    """Read one record.

    Raises:
        ArtifactError: the file cannot be read or is no record of this version.
    """
    try:
        return Record.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ArtifactError(
            "a record cannot be read", where=str(path), found=error.strerror, fix="run `quantlab eval` again"
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ArtifactError(
            "a file is no record of this version",
            where=f"{path}, {'.'.join(map(str, first['loc']))}",
            found=first["msg"],
            fix="run `quantlab eval` again",
        ) from error
