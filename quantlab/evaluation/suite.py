"""The suite: what is measured of every artifact, and how much of it, as one YAML file of eval/suites."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from quantlab.documents import load_document, nearest
from quantlab.errors import EvaluationError
from quantlab.evaluation.tasks.offline import LoadedTask, Task, load_task


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TextSuite(_Strict):
    """The held-out text that quality is measured on."""

    corpus: str
    """JSON lines with `id`, `domain` and `text`; path relative to the suite."""
    length: int = Field(default=512, ge=8)
    """Tokens the model sees at once, a beginning-of-sequence token included."""
    tokens_per_domain: int = Field(gt=0)
    """Most tokens scored per domain; the first window of every document comes before any document's second."""
    predictions_bytes: int = Field(default=4 << 30, gt=0)
    """Most bytes that the baseline's hidden states may take, besides its head; where those of all tokens need more, the KL is
    taken on one token in two, three …, evenly spaced, which the record says."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the activations. A router that picks experts amplifies rounding, so differences of artifacts show best in float32."""


class ServedSuite(_Strict):
    """How much text is decoded in 16 bits, step by step, to compare the artifact as it is served with its float32 logits."""

    sequences: int = Field(default=16, gt=0)
    """Documents whose beginnings are decoded one by one, and then continued greedily all at once."""
    prefix: int = Field(default=32, gt=0)
    """Tokens of each that are read as a prompt."""
    steps: int = Field(default=33, gt=0)
    """Tokens of each that are stepped through after the prompt; those of all sequences are the n of the numbers."""
    greedy_tokens: int = Field(default=64, gt=0)
    """Tokens of each greedy continuation."""


class SpeedSuite(_Strict):
    """The model that speed is measured on, and how long.

    Without `shape` that is the model at hand: all artifacts themselves where they fit into memory together, else one layer of each
    kind, with random weights.
    """

    description: str = ""
    """The twin of a fixed shape in a few words, for the heads of tables."""
    shape: dict[str, JsonValue] = {}
    """The config.json of a random-weight twin that is timed in place of the model at hand."""
    batches: tuple[int, ...] = Field(default=(1, 8), min_length=1)
    """Sequences decoded at once."""
    prefill_batches: tuple[int, ...] = Field(default=(1,), min_length=1)
    """Prompts read at once."""
    prompt: int = Field(default=64, gt=0)
    """Tokens in the cache when decoding starts, and tokens of a prefill."""
    steps: int = Field(default=4, gt=0)
    """Tokens decoded per sequence and turn."""
    processes: int = Field(default=3, ge=2)
    """Processes that build and time all twins, one after the other: what they differ by cannot be told from one, and hardly from two."""
    rounds: int = Field(default=15, ge=6)
    """Most rounds of all processes together; each times every twin at every batch size, at least once."""
    seconds: float = Field(default=30.0, gt=0)
    """Of timing, all processes together: after its share no further round starts, unless a process has done fewer than three."""
    task_seconds: float = Field(default=0.3, ge=0)
    """That a batch size takes in a round at least, all twins together: what is over sooner has several turns."""
    energy_seconds: float = Field(default=0.0, ge=0)
    """Steady decoding per twin and batch that energy is read around, where the device counts it; 0 leaves it out."""

    @model_validator(mode="after")
    def _is_whole(self) -> "SpeedSuite":
        return _with_both(self)


Implementation = Literal["quantlab_latent_sdpa", "sdpa", "eager", "flash_attention_2"]
"""Of attention: the runtime's own, and those of transformers it is compared with."""


class AttentionSuite(_Strict):
    """Long contexts under every implementation of attention: memory beyond the weights, and speed."""

    implementations: tuple[Implementation, ...] = Field(
        default=("quantlab_latent_sdpa", "sdpa", "eager", "flash_attention_2"), min_length=1
    )
    """Which; one that is not installed says so in its cells."""
    contexts: tuple[Annotated[int, Field(ge=16)], ...] = Field(default=(2048, 8192, 32768), min_length=1)
    """Tokens of the one sequence that is read; what cannot fit the free memory is not tried, and says so."""
    description: str = ""
    """The twin in a few words; that of `speed` if left out."""
    shape: dict[str, JsonValue] = {}
    """The config.json of the twin; that of `speed` if left out, and if that has none, the model's own layers.
    `max_position_embeddings` is made to fit the contexts."""
    steps: int = Field(default=4, gt=0)
    """Tokens decoded per repeat."""
    repeats: int = Field(default=7, gt=0)
    """Most repeats of each prefill, and of each decode."""
    seconds: float = Field(default=20.0, ge=0)
    """After this long no further repeat of a prefill, or of a decode, starts."""

    @model_validator(mode="after")
    def _is_whole(self) -> "AttentionSuite":
        return _with_both(self)


_Shaped = TypeVar("_Shaped", SpeedSuite, AttentionSuite)


def _with_both(suite: _Shaped) -> _Shaped:
    if bool(suite.shape) != bool(suite.description):
        raise ValueError("a twin of a fixed shape needs `shape` and `description`; leave out both for the default")
    return suite


class SuiteTask(_Strict):
    """A task, and how much of it."""

    task: str = Field(min_length=1)
    """A file of eval/tasks, relative to the suite and ending in .yaml, or the name of a task or group of lm-eval's."""
    metric: str | None = None
    """The metric; the task's first if left out. Of lm-eval's also with the filter of answers: "exact_match,strict-match"."""
    definitions: str | None = None
    """Directory with task files in lm-eval's format besides its own, relative to the suite."""
    items: int | None = Field(default=None, gt=0)
    """Most items, of each part of a group of lm-eval's; all if left out."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Of what is drawn: items, examples, sampled answers. Each gives a result of its own."""
    shots: int | None = Field(default=None, ge=0)
    """Solved examples before each item (lm-eval's own tasks); the task's own number if left out."""
    temperature: float = Field(default=0.0, ge=0)
    """Of sampled answers; 0 takes the most likely token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sampled answers take tokens from the most likely ones that together have this probability."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Most tokens of an answer; the task's own number if left out."""
    run_code: bool = False
    """Agrees that code a model has written is run on this machine, as tasks like humaneval do."""

    @property
    def ours(self) -> bool:
        return self.task.endswith((".yaml", ".yml"))

    @model_validator(mode="after")
    def _fits(self) -> "SuiteTask":
        if self.ours and (self.shots or self.temperature or self.max_tokens or self.run_code):
            raise ValueError(
                f"the answers of {self.task} are scored, not written; leave out shots, temperature, max_tokens and run_code"
            )
        return self


class Suite(_Strict):
    """One set of measurements, the same for every artifact."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)
    """The suite's name."""
    version: int = Field(gt=0)
    """Raised by every change that alters numbers."""
    text: TextSuite
    """Quality."""
    served: ServedSuite = ServedSuite()
    """The artifact as it is served: in 16 bits, step by step."""
    speed: SpeedSuite | None = None
    """Speed; left out, it is not measured."""
    attention: AttentionSuite | None = None
    """Long contexts by implementation of attention; left out, they are not measured."""
    tasks: tuple[SuiteTask, ...] = ()
    """Tasks, in the order of the tables."""
    layer_error_tokens: int = Field(default=1024, ge=0)
    """Tokens that the error of each layer is measured on; 0 leaves it out."""

    @property
    def attention_twin(self) -> tuple[str, dict[str, JsonValue]]:
        """Description and shape of the twin that attention is measured on; empty for the model's own layers."""
        assert self.attention is not None, "asked of suites that measure attention"
        shaped = next((one for one in (self.attention, self.speed) if one is not None and one.shape), None)
        return (shaped.description, shaped.shape) if shaped is not None else ("", {})


@dataclass(frozen=True)
class TaskRun:
    """One task with one of its seeds.

    Attributes:
        wanted: what the suite says of the task.
        seed: of what is drawn.
        name: as results give it.
        metric: as results give it; None where lm-eval decides.
    """

    wanted: SuiteTask
    seed: int
    name: str
    metric: str | None


@dataclass(frozen=True)
class LoadedSuite:
    """A suite and where it came from.

    Attributes:
        path: the file.
        suite: what it says.
        sha256: hash of the file and of the corpus and tasks it names, so that the same hash means the same questions.
        tasks: those of the suite that are files, by what the suite calls them.
    """

    path: Path
    suite: Suite
    sha256: str
    tasks: dict[str, LoadedTask]

    @property
    def corpus(self) -> Path:
        return (self.path.parent / self.suite.text.corpus).resolve()

    @property
    def runs(self) -> tuple[TaskRun, ...]:
        """Every task with every one of its seeds, in the order of the tables."""
        runs = []
        for wanted in self.suite.tasks:
            name, metric = wanted.task, wanted.metric
            if wanted.ours:
                task = self.tasks[wanted.task].task
                name, metric = task.name, metric or task.metrics[0]
            runs += [TaskRun(wanted, seed, name, metric) for seed in wanted.seeds]
        return tuple(runs)

    @property
    def title(self) -> str:
        """Name and version, as records give it."""
        return f"{self.suite.name} {self.suite.version}"


def load_suite(path: Path) -> LoadedSuite:
    """Read and check a suite.

    Raises:
        RecipeError: the file or a task's cannot be read, is no YAML, or says something it cannot say.
        EvaluationError: the corpus or the items of a task cannot be read, or a task has not the metric asked for.
    """
    suite, content = load_document(path, Suite, kind="suite")
    corpus = (path.parent / suite.text.corpus).resolve()
    try:
        text = corpus.read_bytes()
    except OSError as error:
        raise EvaluationError(
            "the held-out text cannot be read",
            where=str(corpus),
            found=error.strerror,
            fix=f"correct `text.corpus` in {path}",
        ) from error
    digest = hashlib.sha256(hashlib.sha256(content).digest() + hashlib.sha256(text).digest())
    tasks = {wanted.task: load_task(path.parent / wanted.task) for wanted in suite.tasks if wanted.ours}
    for wanted in suite.tasks:
        if wanted.ours:
            digest.update(tasks[wanted.task].sha256.encode())
            _check_metric(wanted, tasks[wanted.task].task, path)
    return LoadedSuite(path, suite, digest.hexdigest(), tasks)


def _check_metric(wanted: SuiteTask, task: Task, path: Path) -> None:
    if wanted.metric is not None and wanted.metric not in task.metrics:
        raise EvaluationError(
            "the task has no such metric",
            where=f"{path}, {wanted.task}",
            found=f"`{wanted.metric}`",
            fix=nearest(wanted.metric, task.metrics),
        )
