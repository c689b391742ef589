"""What is asked of a worker and what it answers. Needs no torch: the process that asks does not compute."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from quantlab.evaluation.quality.metrics import Quality
from quantlab.evaluation.record import AttentionCell, TaskResult
from quantlab.evaluation.speed.metrics import Timed

Progress = Callable[[str, int, int], None]
"""Told of a stage, how much of it is done and how much there is (0 when that is not known)."""

SendPart = Callable[[BaseModel], None]
"""Takes a part of a cell's answer as soon as it is there."""

EXPLAINED = 3
"""Exit code of a cell that could say what is wrong; the file of its result then holds the reason as text."""


Role = Literal["baseline", "compared", "alone"]

PREDICTIONS_COMPLETE = "complete.json"
"""Written last into the directory of the baseline's predictions."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class QualityRequest(_Strict):
    """One artifact's quality; answered with a `QualityResult`."""

    kind: Literal["quality"] = "quality"
    directory: Path
    """The artifact."""
    suite: Path
    """The suite."""
    predictions: Path
    """Directory of the baseline's predictions."""
    role: Role
    """Whether the artifact is the baseline (its predictions are kept), is compared with it, or has none to be compared with."""
    key: str
    """Names the baseline and the suite; kept with the predictions."""
    device: str = "cpu"
    """Where the model computes: "cpu", "cuda" or "cuda:1"."""


class QualityResult(_Strict):
    """What was measured, and which parts of it were not."""

    quality: Quality
    """All that is a number."""
    failures: dict[str, str]
    """Part -> why it is none: "layer 3"."""


class ServedRequest(_Strict):
    """One artifact as it is decoded in its own dtype; answered with a `Served`."""

    kind: Literal["served"] = "served"
    directory: Path
    """The artifact."""
    suite: Path
    """The suite."""
    predictions: Path | None
    """Directory of the baseline's predictions; None for the baseline itself, or where there are none."""
    device: str = "cpu"
    """As in `QualityRequest`."""


class TasksRequest(_Strict):
    """One artifact's answers to some of the suite's tasks; each is told as soon as it is there, as a `TaskAnswer`."""

    kind: Literal["tasks"] = "tasks"
    directory: Path
    """The artifact."""
    suite: Path
    """The suite."""
    runs: tuple[int, ...]
    """Which: indices into `LoadedSuite.runs`."""
    scores: Path
    """File of the baseline's scores, item by item."""
    role: Literal["baseline", "compared"]
    """As in `QualityRequest`."""
    key: str
    """As in `QualityRequest`."""
    device: str = "cpu"
    """As in `QualityRequest`."""


class TaskAnswer(_Strict):
    """One task; with neither a result nor a reason it has only been begun."""

    run: int
    """Which: an index into `LoadedSuite.runs`."""
    result: TaskResult | None = None
    """What was measured."""
    reason: str | None = None
    """Why there is no result, or what it lacks."""


class TasksResult(_Strict):
    """What is left to say when all tasks have been told."""

    answered: int
    """How many."""


class MemoryRequest(_Strict):
    """One artifact's memory; answered with a `Memory`."""

    kind: Literal["memory"] = "memory"
    directory: Path
    """The artifact."""
    suite: Path
    """The suite."""
    device: str = "cpu"
    """As in `QualityRequest`."""


class SpeedRequest(_Strict):
    """The speed of several artifacts in one process; answered with a `SpeedResult`."""

    kind: Literal["speed"] = "speed"
    suite: Path
    """The suite."""
    artifacts: dict[str, Path]
    """Variant -> directory of its artifact."""
    source: Path
    """A checkpoint in floating point of the same model; in float16 it is the FP16 side where no artifact is."""
    timed: Timed | None = None
    """What is timed, as an earlier process chose it; None to choose."""
    process: int = 0
    """Which of the suite's processes this is; orders the rounds."""
    device: str = "cpu"
    """As in `QualityRequest`."""


class ModelTimings(_Strict):
    """What one model did in one process."""

    layout: str
    """Of its weights, for people."""
    is_fp16: bool
    """Whether it is the one that ratios are taken against."""
    variants: tuple[str, ...]
    """Those it stands for."""
    memory_percent_of_fp16: float
    """Bytes it holds for its weights, in percent of the same weights at two bytes each."""
    rates: dict[str, tuple[float, ...]]
    """Tokens per second in each turn, by what was done: "decode.1", "prefill.8"."""
    joules: dict[str, tuple[float, ...]]
    """Joules per decoded token in each stretch, by batch size; empty where the device does not count them."""
    not_fused: str | None = None
    """Why its steps were not fused, None where they were."""


class SpeedResult(_Strict):
    """What one process timed; every variant is in a twin or among the failures."""

    timed: Timed
    """Which kind of models."""
    model: str
    """The models in a few words."""
    computed_by: str
    """The GPU, or whose operators the processor ran, and how steps ran."""
    timings: tuple[ModelTimings, ...]
    """Entry i of a rate is from the same turn in all twins, entry i of all joules from the same stretch."""
    failures: dict[str, str]
    """Variant -> why it could not be measured."""
    others: str | None
    """What other processes did meanwhile; None if nothing that matters."""
    others_of_energy: str | None
    """The same, while energy was read."""


class AttentionRequest(_Strict):
    """One implementation of attention at one context; answered with an `AttentionResult`."""

    kind: Literal["attention"] = "attention"
    directory: Path
    """The artifact whose layout the twin's weights have."""
    suite: Path
    """The suite."""
    implementation: str
    """Of attention."""
    context: int
    """Tokens."""
    device: str = "cpu"
    """As in `QualityRequest`."""


class AttentionResult(_Strict):
    """What was measured, or why not."""

    cell: AttentionCell
    """The numbers."""
    layout: str = ""
    """Of the twin's weights; empty where it was not made."""


CellRequest = Annotated[
    QualityRequest | ServedRequest | TasksRequest | MemoryRequest | SpeedRequest | AttentionRequest,
    Field(discriminator="kind"),
]


class Job(_Strict):
    """One cell and the files around it."""

    request: CellRequest
    """What to measure."""
    result: Path
    """Takes the answer as JSON."""
    log: Path
    """Takes everything the cell prints."""
    threads: int
    """Threads to compute with."""


def predictions_complete(directory: Path, key: str) -> bool:
    """Whether the predictions in `directory` are all there and those of the baseline and suite that `key` names."""
    try:
        return bool(json.loads((directory / PREDICTIONS_COMPLETE).read_bytes())["key"] == key)
    except (OSError, ValueError, KeyError, TypeError):
        return False
