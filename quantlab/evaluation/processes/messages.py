"""Requests to the worker process and its answers. Needs no torch: the requesting process does not compute."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from quantlab.evaluation.quality.metrics import Quality
from quantlab.evaluation.record import AttentionCell, TaskResult
from quantlab.evaluation.speed.metrics import Timed

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the amount done and the total (0 if unknown)."""

SendPart = Callable[[BaseModel], None]
"""Sends a part of a cell's answer before the cell ends."""

EXPLAINED = 3
"""Exit code of a cell that failed with a known error; its result file then holds the reason as text."""

Role = Literal["baseline", "compared", "alone"]

PREDICTIONS_COMPLETE = "complete.json"
"""File that is written last into the directory of the baseline's predictions."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class QualityRequest(_Strict):
    """Measure the quality of one artifact; the answer is a `QualityResult`."""

    kind: Literal["quality"] = "quality"
    directory: Path
    """The artifact."""
    suite: Path
    """The suite."""
    held_out: Path | None = None
    """Held-out text that was drawn from the suite's datasets; None if it names a corpus."""
    predictions: Path
    """Directory of the baseline's predictions."""
    role: Role
    """baseline: its predictions are stored. compared: it is compared with the stored ones. alone: no predictions are available."""
    key: str
    """Hash of everything that the baseline's predictions depend on; stored with them."""
    device: str = "cpu"
    """Device of the model: "cpu", "cuda" or "cuda:1"."""


class QualityResult(_Strict):
    """The measured quality, and the parts that could not be measured."""

    quality: Quality
    """The finite numbers."""
    failures: dict[str, str]
    """Part ("layer 3") -> the reason why it has no number."""


class ServedRequest(_Strict):
    """Decode one artifact in its own dtype; the answer is a `Served`."""

    kind: Literal["served"] = "served"
    directory: Path
    """The artifact."""
    suite: Path
    """The suite."""
    held_out: Path | None = None
    """Held-out text that was drawn from the suite's datasets; None if it names a corpus."""
    predictions: Path | None
    """Directory of the baseline's predictions; None for the baseline itself, or if there are none."""
    device: str = "cpu"
    """As in `QualityRequest`."""


class TasksRequest(_Strict):
    """Answer tasks of the suite with one artifact; each answer is sent when complete, as a `TaskAnswer`."""

    kind: Literal["tasks"] = "tasks"
    directory: Path
    """The artifact."""
    suite: Path
    """The suite."""
    runs: tuple[int, ...]
    """The tasks, as indices into `LoadedSuite.runs`."""
    scores: Path
    """File of the baseline's scores, item by item."""
    role: Literal["baseline", "compared"]
    """As in `QualityRequest`."""
    key: str
    """As in `QualityRequest`."""
    device: str = "cpu"
    """As in `QualityRequest`."""


class TaskAnswer(_Strict):
    """The state of one task: started if it has neither a result nor a reason."""

    run: int
    """Index into `LoadedSuite.runs`."""
    result: TaskResult | None = None
    """The measured result."""
    reason: str | None = None
    """The reason why there is no result, or why its comparison is missing."""


class TasksResult(_Strict):
    """The last message, after all task answers were sent."""

    answered: int
    """Number of tasks."""


class TrialRequest(_Strict):
    """Try the suite's lm-eval tasks without a model, before the work of a run; the answer is a `TrialResult`."""

    kind: Literal["trial"] = "trial"
    suite: Path
    """The suite."""


class TrialResult(_Strict):
    """All tasks can be run."""

    tried: int
    """Number of tasks."""


class MemoryRequest(_Strict):
    """Measure the memory of one artifact; the answer is a `Memory`."""

    kind: Literal["memory"] = "memory"
    directory: Path
    """The artifact."""
    suite: Path
    """The suite."""
    turn: Path | None = None
    """File that is locked while loading is timed, so that cells running side by side time it in turn; None to run alone."""
    device: str = "cpu"
    """As in `QualityRequest`."""


class SpeedRequest(_Strict):
    """Time several artifacts in one process; the answer is a `SpeedResult`."""

    kind: Literal["speed"] = "speed"
    suite: Path
    """The suite."""
    artifacts: dict[str, Path]
    """Variant -> directory of its artifact."""
    source: Path
    """Floating-point checkpoint of the same model; timed in float16 as the FP16 reference if no artifact is in float16."""
    timed: Timed | None = None
    """Kind of the timed models as an earlier process chose it; None to choose it."""
    process: int = 0
    """Index of this process; seeds the order of the rounds."""
    only_prepare: str = ""
    """A variant whose model is built and warmed up, so that its kernels are compiled into the cache on disk; nothing is timed."""
    device: str = "cpu"
    """As in `QualityRequest`."""


class ModelTimings(_Strict):
    """The timings of one model in one process."""

    layout: str
    """Name of the layout of its weights."""
    is_fp16: bool
    """Whether it is the FP16 reference of the ratios."""
    variants: tuple[str, ...]
    """The variants with this layout."""
    memory_percent_of_fp16: float
    """Bytes of its weights in memory, in percent of the same weights at two bytes each."""
    rates: dict[str, tuple[float, ...]]
    """Tokens per second in each turn, by phase and batch size: "decode.1", "prefill.8"."""
    joules: dict[str, tuple[float, ...]]
    """Joules per decoded token in each interval, by batch size; empty if the device has no meter."""
    not_fused: str | None = None
    """The reason why its steps were not fused; None if they were."""


class SpeedResult(_Strict):
    """The timings of one process; every variant is in one of them or among the failures, unless nothing was to be timed."""

    timed: Timed
    """Kind of the timed models."""
    model: str
    """Short description of the models."""
    computed_by: str = ""
    """The GPU, or the operators that the CPU ran, and how the decoder ran its steps."""
    timings: tuple[ModelTimings, ...] = ()
    """Entry i of a rate is from the same turn in all models; entry i of all joules is from the same interval."""
    failures: dict[str, str] = {}
    """Variant -> the reason why it could not be timed."""
    others: str | None = None
    """Contention by other processes during the rounds; None if there was none."""
    others_of_energy: str | None = None
    """The same for the energy readings."""


class AttentionRequest(_Strict):
    """Measure one implementation of attention at one context length; the answer is an `AttentionResult`."""

    kind: Literal["attention"] = "attention"
    directory: Path
    """The artifact whose layout the twin uses."""
    suite: Path
    """The suite."""
    implementation: str
    """Implementation of attention."""
    context: int
    """Context length in tokens."""
    device: str = "cpu"
    """As in `QualityRequest`."""


class AttentionResult(_Strict):
    """The measured cell, or the reason why it was not measured."""

    cell: AttentionCell
    """The numbers or the reason."""
    layout: str = ""
    """Name of the layout of the twin's weights; empty if the twin was not built."""


CellRequest = Annotated[
    QualityRequest | ServedRequest | TasksRequest | TrialRequest | MemoryRequest | SpeedRequest | AttentionRequest,
    Field(discriminator="kind"),
]


class Job(_Strict):
    """One cell with its files."""

    request: CellRequest
    """The request."""
    result: Path
    """Output file of the answer, as JSON."""
    log: Path
    """Output file of everything that the cell prints."""
    threads: int
    """Number of threads to compute with."""


def predictions_complete(directory: Path, key: str) -> bool:
    """Whether the predictions in `directory` are complete and were stored under `key`."""
    try:
        return bool(json.loads((directory / PREDICTIONS_COMPLETE).read_bytes())["key"] == key)
    except (OSError, ValueError, KeyError, TypeError):
        return False
