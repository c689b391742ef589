"""A record: all measurements of one artifact, stored as the file that tables are built from.

A record is self-contained: it names the artifact, the suite, the hardware and the versions, and holds every number with its
interval. `report` reads only records. Later versions may add fields but do not rename these. The metrics are declared in
`quality.metrics`, `served.metrics`, `memory.metrics` and `speed.metrics`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from pydantic import ValidationError
from pydantic_core import from_json

from quantlab.errors import ArtifactError
from quantlab.evaluation.engines.verdict import EngineVerdict
from quantlab.evaluation.measured import Frozen, Measured, Significance
from quantlab.evaluation.memory.metrics import Memory
from quantlab.evaluation.old_records import with_later_fields
from quantlab.evaluation.quality.metrics import Quality
from quantlab.evaluation.served.metrics import Served
from quantlab.evaluation.speed.metrics import Speed


class MatrixErrors(Frozen):
    """Errors of the matrices of one kind in one layer, measured while the artifact was made and read from its manifest."""

    layer: str
    """Block as the manifest names it: "layer 3"."""
    kind: str
    """Name of the matrices without layer and expert: "mlp.experts.gate_proj"."""
    count: int
    """Matrices that were changed."""
    relative_error: float
    """Frobenius norm of the change over that of the weight; median over the matrices."""
    relative_error_max: float
    output_error: float | None = None
    """Squared error of the outputs over squared outputs on the calibration text; median over the matrices; None without activations."""
    output_error_max: float | None = None
    worst: str = ""
    """The matrix with the largest output error (relative error where there is none)."""
    fallbacks: dict[str, int] = {}
    """Substitutes for the recipe's algorithm, with the number of matrices each was used for."""


PARTS: Final[Mapping[str, type[Frozen]]] = {"quality": Quality, "served": Served, "memory": Memory, "speed": Speed}
"""The parts of a record whose metrics have columns, by their fields of `Record`."""
TaskKey = tuple[str, str, int]
"""Name, metric and seed, which identify a result within a record."""


class TaskResult(Frozen):
    """One task: its score, and the loss against the baseline on the same items."""

    name: str
    """As the suite names it: "continuation", "arc_challenge"."""
    version: str
    """Version of the task's data and construction; scores of different versions cannot be compared."""
    source: Literal["quantlab", "lm-eval"] = "quantlab"
    """Origin of the task's definition."""
    metric: str
    """ "accuracy", "exact_match" …"""
    higher_is_better: bool = True
    score: Measured
    """In the metric's own unit; shares from 0 to 1. The interval is over documents, or over items if each is its own document."""
    n: int
    """Items."""
    random_baseline: float | None = None
    """Expected score of random guessing; None if guessing is not defined."""
    baseline_score: float | None = None
    """Score of the baseline; this and the following comparisons are None for the baseline itself."""
    loss: Measured | None = None
    """How much worse than the baseline on the same items, in the metric's unit (0.01: one percentage point); positive is worse."""
    to_wrong: int | None = None
    """Items that the baseline answers correctly and the artifact wrongly; None if the metric is not right or wrong per item."""
    to_right: int | None = None
    """Items that the artifact answers correctly and the baseline wrongly."""
    significance: Significance | None = None
    """McNemar's exact test of the changed items if items are right or wrong, else the bootstrap test; the verdict is on the loss."""
    by_group: dict[str, Measured] = {}
    """Score within groups of items, such as context lengths or kinds of sentences; empty if there is one group."""
    decoding: str = ""
    """How an answer is obtained: "log-likelihood", "greedy, at most 256 tokens"."""
    shots: int = 0
    """Solved examples before each item."""
    seed: int = 0
    """Seed of the order of items and of the examples."""
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


class AttentionCell(Frozen):
    """One implementation of attention at one length of context, one sequence, on a random-weight twin."""

    implementation: str
    """ "quantlab_latent_sdpa", "sdpa", "eager", "flash_attention_2"."""
    context: int
    """Tokens."""
    prefill_peak_bytes: int | None = None
    """Peak memory above the weights during prefill, including the cache; this and the following are None if not measured."""
    decode_peak_bytes: int | None = None
    """The same during decoding; also None if the system cannot reset a process's peak."""
    cache_bytes: int | None = None
    """Size of the cache after the context."""
    prefill_tokens_per_second: Measured | None = None
    decode_tokens_per_second: Measured | None = None
    """Decoding step by step with a growing cache."""
    quartiles: dict[str, tuple[float, float]] = {}
    """First and third quartile over repeats, by "prefill_tokens_per_second" and "decode_tokens_per_second"; empty without repeats."""
    noise: dict[str, str] = {}
    """Reasons why the measurement of a rate is noisy, by the same names."""
    reason: str | None = None
    """Reason where it was not measured: "not tried: about 211.5 GB needed, 16.0 GB free"."""


class Attention(Frozen):
    """Memory beyond the weights and speed of long contexts, by implementation of attention."""

    twin: str
    """The model that was measured: width and layers of the twin."""
    layout: str
    """Name of the layout of its weights; empty if nothing could be measured."""
    memory: Literal["process", "cuda"]
    """The kind of memory of the peaks, as in `Memory.peak_memory_of`."""
    cells: tuple[AttentionCell, ...]


class Calibrated(Frozen):
    """Device and dtype of the artifact's calibration."""

    device: str
    """ "cpu" or "cuda"."""
    gpu: str
    """Name of the GPU, empty on the CPU."""
    cpu: str
    """Name of the CPU."""
    dtype: str
    """Dtype of weights and activations: "float32" or "bfloat16"."""


class Made(Frozen):
    """Code, libraries and calibration device that made the artifact, from its manifest."""

    code: str
    """Fingerprint of the code."""
    versions: dict[str, str]
    """Versions of the libraries whose arithmetic determines numbers."""
    calibration: Calibrated | None = None
    """None if nothing was calibrated."""


class Pass(Frozen):
    """One pass of the recipe that made the artifact."""

    operation: Literal["cast", "quantize", "prune", "remove experts"]
    setting: str
    """Number format, dtype or share: "int4_g128", "float16", "0.08"."""
    algorithm: str = ""
    """Its name; empty for a cast."""

    @property
    def change(self) -> tuple[str, str]:
        """The change without the algorithm that chose the values."""
        return self.operation, self.setting


class Foreign(Frozen):
    """An artifact that another tool made."""

    method: str
    """Its `quant_method`, "dense" if it has none."""
    producer: str = ""
    """The program, with its version, that its files name; empty if they name none."""


class Failure(Frozen):
    """A cell that could not be measured."""

    cell: Literal["quality", "served", "memory", "speed", "tasks"]
    reason: str


class Record(Frozen):
    """One evaluation of one artifact."""

    schema_version: Literal[1] = 1
    recipe: str
    recipe_sha256: str
    variant: str
    description: str
    """The passes in one line of text: "int4_g128 (rtn)"."""
    passes: tuple[Pass, ...] = ()
    """The passes as data; empty for an unchanged checkpoint and for what another tool made."""
    foreign: Foreign | None = None
    """None for what quantlab made, and for `source`."""
    artifact: str
    """Directory of the artifact, relative to the run's directory; the checkpoint's own for `source`."""
    artifact_sha256: str
    """Hash of the artifact's manifest; of the checkpoint's configuration and weights for `source` and for what another tool made."""
    baseline: str
    """The variant that losses are relative to."""
    baseline_sha256: str = ""
    """Its `artifact_sha256`."""
    suite: str
    """Name and version of the suite."""
    suite_sha256: str
    """Hash of the suite and of the text and tasks that it names."""
    suite_name: str = ""
    """Name of the suite without its version. A leaderboard does not mix two versions in a column."""
    suite_version: int = 0
    seeds: dict[str, int] = {}
    """Every seed that a number depends on, by the random draw it seeds: "bootstrap", "speed twin", "task continuation"."""
    command: str = ""
    """The command line: "quantlab run recipes/quickstart.yaml"."""
    hardware: str
    versions: dict[str, str]
    made: Made | None = None
    """None for `source`, and for artifacts whose manifest does not state it."""
    code: dict[str, str] = {}
    """Fingerprint of the code that measured each cell ("quality", "tasks" …); a cell is measured again when its code changes."""
    environment: dict[str, str] = {}
    """Environment variables that select instructions and kernels (`ONEDNN_MAX_CPU_ISA`, `QUANTLAB_NATIVE` …), if set."""
    quality: Quality | None
    served: Served | None = None
    """None if it failed, and in records of earlier versions."""
    memory: Memory | None
    speed: Speed | None
    failures: tuple[Failure, ...]
    tokens_per_expert: dict[str, tuple[int, ...]] = {}
    """Calibration tokens of every routed expert by block, from the artifact's manifest; empty if they were not counted."""
    tasks: tuple[TaskResult, ...] = ()
    """In the order of the suite."""
    attention: Attention | None = None
    """Results for the suite's contexts; only in the baseline's record, None if the suite has no attention section."""
    matrix_errors: tuple[MatrixErrors, ...] = ()
    """Errors of the changed matrices, by layer and kind; empty if none was changed or the manifest does not state them."""
    engines: tuple[EngineVerdict, ...] = ()
    """Verdicts of other engines on the artifact and its exports, from its verdicts.json; empty if none was asked."""


def read_record(path: Path) -> Record:
    """Read one record.

    Raises:
        ArtifactError: the file cannot be read or is not a record of this version.
    """
    try:
        return Record.model_validate(with_later_fields(from_json(path.read_bytes())))
    except OSError as error:
        raise ArtifactError(
            "a record cannot be read", where=str(path), found=error.strerror, fix="run `quantlab eval` again"
        ) from error
    except ValueError as error:  # invalid JSON or fields
        first = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
        raise ArtifactError(
            "a file is not a record of this version",
            where=", ".join([str(path), *([".".join(map(str, first["loc"]))] if first else [])]),
            found=first["msg"] if first else str(error),
            fix="run `quantlab eval` again",
        ) from error
