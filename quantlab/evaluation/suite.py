"""The suite: the measurements made on every artifact and their size, as one YAML file of eval/suites."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from quantlab.documents import load_document, nearest
from quantlab.errors import EvaluationError
from quantlab.evaluation.tasks.offline import LoadedTask, Task, load_task
from quantlab.recipe.texts import MixedSource, TextChoices, TextSource, check_text, sources_of
from quantlab.shipped import locate


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TextSuite(TextChoices):
    """The held-out text that quality is measured on."""

    corpus: str | None = None
    """JSON lines with `id`, `domain` and `text`; path relative to the suite."""
    dataset: str | None = Field(default=None, min_length=1)
    """In place of `corpus`: a preset, a Hugging Face id, or a file or folder relative to the suite. It is one domain."""
    mix: tuple[MixedSource, ...] = ()
    """In place of `corpus`: several datasets, each a domain with its share of the documents."""
    documents: int = Field(default=200, ge=5)
    """Number of documents drawn from datasets."""
    seed: int = Field(default=0, ge=0)
    """Seed of the choice of documents from datasets."""
    length: int = Field(default=512, ge=8, le=1 << 18)
    """Tokens of one window, including a beginning-of-sequence token, at most the model's context."""
    tokens_per_domain: int = Field(gt=0)
    """Maximum number of tokens scored per domain. The first windows of all documents are taken before any second window."""
    predictions_bytes: int = Field(default=4 << 30, gt=0)
    """Maximum size of the baseline's stored hidden states in bytes, without the head. If the states of all tokens exceed it, the
    KL is computed on every second, third … token; the record states this."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the activations. Routers amplify rounding errors, so float32 shows differences between artifacts best."""

    @model_validator(mode="after")
    def _check_text(self) -> "TextSuite":
        check_text(
            corpus=self.corpus, dataset=self.dataset, mix=self.mix, chosen=self.chosen, example="corpus: FILE.jsonl"
        )
        if any(source.special_tokens == "text" for source in self.sources):
            raise ValueError("held-out text is read as models read it; leave `special_tokens` out")
        return self

    @property
    def sources(self) -> tuple[TextSource, ...]:
        """The datasets; none for a corpus."""
        return sources_of(self, self.dataset, self.mix)


class ServedSuite(_Strict):
    """Amount of text that is decoded step by step in 16 bits, to compare the served artifact with its float32 logits."""

    sequences: int = Field(default=16, gt=0)
    """Number of documents whose beginnings are decoded one by one, and then continued greedily as one batch."""
    prefix: int = Field(default=32, gt=0)
    """Tokens of each document that are read as a prompt."""
    steps: int = Field(default=33, gt=0)
    """Tokens of each document decoded step by step after the prompt; the n of the numbers counts them over all sequences."""
    greedy_tokens: int = Field(default=64, gt=0)
    """Tokens of each greedy continuation."""


class SpeedSuite(_Strict):
    """The model that speed is measured on, and the duration of the measurement.

    Without `shape`, the recipe's own model is timed: the artifacts themselves if all of them fit into memory together, else a
    random-weight twin with one layer of each kind.
    """

    description: str = ""
    """Short description of the twin of a fixed shape, for table headings."""
    shape: dict[str, JsonValue] = {}
    """The config.json of a random-weight twin that is timed in place of the recipe's own model."""
    batches: tuple[int, ...] = Field(default=(1, 8), min_length=1)
    """Batch sizes of decoding."""
    prefill_batches: tuple[int, ...] = Field(default=(1,), min_length=1)
    """Batch sizes of prefill."""
    prompt: int = Field(default=64, gt=0)
    """Tokens in the cache when decoding starts, and tokens of a prefill."""
    steps: int = Field(default=4, gt=0)
    """Tokens decoded per sequence in one turn."""
    processes: int = Field(default=3, ge=2)
    """Number of processes that build and time all models, one after the other. Their variation cannot be estimated from one process
    and hardly from two."""
    rounds: int = Field(default=15, ge=6)
    """Maximum number of rounds, summed over the processes. A round times every model at every batch size at least once."""
    seconds: float = Field(default=30.0, gt=0)
    """Seconds of timing, summed over the processes. After its share a process starts no further round, except to complete three."""
    task_seconds: float = Field(default=0.3, ge=0)
    """Minimum seconds per batch size in a round, summed over the models: short tasks are repeated."""
    energy_seconds: float = Field(default=0.0, ge=0)
    """Seconds of steady decoding per model and batch size for the energy reading, if the device has a meter; 0 skips it."""

    @model_validator(mode="after")
    def _is_whole(self) -> "SpeedSuite":
        return _with_both(self)


Implementation = Literal["quantlab_latent_sdpa", "sdpa", "eager", "flash_attention_2"]
"""Implementations of attention: the runtime's own, and those of transformers that it is compared with."""


class AttentionSuite(_Strict):
    """Long contexts under every implementation of attention: memory beyond the weights, and speed."""

    implementations: tuple[Implementation, ...] = Field(
        default=("quantlab_latent_sdpa", "sdpa", "eager", "flash_attention_2"), min_length=1
    )
    """Implementations to measure; the cells of one that is not installed state this as their reason."""
    contexts: tuple[Annotated[int, Field(ge=16)], ...] = Field(default=(2048, 8192, 32768), min_length=1)
    """Lengths of the single sequence in tokens. A combination that cannot fit into free memory is not tried; its cell says so."""
    description: str = ""
    """Short description of the twin; that of `speed` if left out."""
    shape: dict[str, JsonValue] = {}
    """The config.json of the twin; that of `speed` if left out; if that is empty too, a twin of the model's own layers.
    `max_position_embeddings` is adapted to the contexts."""
    steps: int = Field(default=4, gt=0)
    """Tokens decoded per repeat."""
    repeats: int = Field(default=7, gt=0)
    """Maximum number of repeats of each prefill and of each decode."""
    seconds: float = Field(default=20.0, ge=0)
    """Seconds after which no further repeat of a prefill, or of a decode, starts."""

    @model_validator(mode="after")
    def _is_whole(self) -> "AttentionSuite":
        return _with_both(self)


_Shaped = TypeVar("_Shaped", SpeedSuite, AttentionSuite)


def _with_both(suite: _Shaped) -> _Shaped:
    if bool(suite.shape) != bool(suite.description):
        raise ValueError("a twin of a fixed shape needs `shape` and `description`; leave out both for the default")
    return suite


class SuiteTask(_Strict):
    """A task and its options."""

    task: str = Field(min_length=1)
    """A file of eval/tasks, relative to the suite and ending in .yaml, or the name of a task or group of lm-eval's."""
    metric: str | None = None
    """The metric; the task's first if left out. For lm-eval tasks also with an answer filter: "exact_match,strict-match"."""
    definitions: str | None = None
    """Directory with additional task files in lm-eval's format, relative to the suite."""
    items: int | None = Field(default=None, gt=0)
    """Maximum number of items; for an lm-eval group, of each of its tasks. All if left out."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Seeds of the random draws (items, examples, sampled answers). Each seed gives a separate result."""
    shots: int | None = Field(default=None, ge=0)
    """Number of solved examples before each item (lm-eval tasks only); the task's own number if left out."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature of written answers; 0 decodes greedily."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: tokens are sampled from the most likely ones whose total probability reaches this value."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Maximum tokens of an answer; the task's own number if left out."""
    run_code: bool = False
    """Permits tasks such as humaneval to run code that the model wrote on this machine."""

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
    """Incremented by every change that alters numbers."""
    text: TextSuite
    """The held-out text of quality."""
    served: ServedSuite = ServedSuite()
    """The served path: decoding in 16 bits, step by step."""
    speed: SpeedSuite | None = None
    """Speed; not measured if left out."""
    attention: AttentionSuite | None = None
    """Long contexts by implementation of attention; not measured if left out."""
    tasks: tuple[SuiteTask, ...] = ()
    """Tasks, in table order."""
    layer_error_tokens: int = Field(default=1024, ge=0)
    """Tokens on which the error of each layer is measured; 0 skips it."""

    @property
    def attention_twin(self) -> tuple[str, dict[str, JsonValue]]:
        """Description and shape of the twin on which attention is measured; empty for the model's own layers."""
        assert self.attention is not None, "asked of suites that measure attention"
        shaped = next((one for one in (self.attention, self.speed) if one is not None and one.shape), None)
        return (shaped.description, shaped.shape) if shaped is not None else ("", {})


@dataclass(frozen=True)
class TaskRun:
    """One task with one of its seeds.

    Attributes:
        wanted: the task's entry in the suite.
        seed: seed of its random draws.
        name: the task's name in results.
        metric: the metric's name in results; None if lm-eval chooses it.
    """

    wanted: SuiteTask
    seed: int
    name: str
    metric: str | None


@dataclass(frozen=True)
class LoadedSuite:
    """A suite read from its file.

    Attributes:
        path: the file.
        suite: its contents.
        sha256: hash of the file, the held-out text and the task files it names: equal hashes mean equal questions.
        tasks: the offline tasks of the suite, by the path that the suite gives.
        held_out: the file of held-out text; None if it is drawn from datasets and was not given.
    """

    path: Path
    suite: Suite
    sha256: str
    tasks: dict[str, LoadedTask]
    held_out: Path | None

    @property
    def corpus(self) -> Path:
        assert self.held_out is not None, "text of datasets is drawn before it is read"
        return self.held_out

    def definitions(self, task: SuiteTask) -> Path | None:
        """Directory of the additional task files of an lm-eval task; None if it names none."""
        return self.path.parent / task.definitions if task.definitions else None

    @property
    def runs(self) -> tuple[TaskRun, ...]:
        """Every task with each of its seeds, in table order."""
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
        """Name and version, as written in records."""
        return f"{self.suite.name} {self.suite.version}"


def load_suite(path: Path, *, held_out: Path | None = None) -> LoadedSuite:
    """Read and check a suite.

    Args:
        path: the suite's file.
        held_out: for a suite whose text is that of datasets, the documents drawn from them (`quantlab.evaluation.held_out`).

    Raises:
        RecipeError: the suite's or a task's file cannot be read, is not YAML, or has an invalid field.
        EvaluationError: the corpus or the items of a task cannot be read, or a task does not have the requested metric.
    """
    suite, content = load_document(path, Suite, kind="suite")
    corpus = held_out if suite.text.corpus is None else _corpus(path, suite.text.corpus)
    text = b"" if corpus is None else _read_text(corpus, path)
    digest = hashlib.sha256(hashlib.sha256(content).digest() + hashlib.sha256(text).digest())
    tasks = {wanted.task: load_task(path.parent / wanted.task) for wanted in suite.tasks if wanted.ours}
    for wanted in suite.tasks:
        if wanted.ours:
            digest.update(tasks[wanted.task].sha256.encode())
            _check_metric(wanted, tasks[wanted.task].task, path)
    return LoadedSuite(path, suite, digest.hexdigest(), tasks, corpus)


def _read_text(corpus: Path, suite: Path) -> bytes:
    try:
        return corpus.read_bytes()
    except OSError as error:
        raise EvaluationError(
            "the held-out text cannot be read",
            where=str(corpus),
            found=error.strerror,
            fix=f"correct `text.corpus` in {suite}",
        ) from error


def _corpus(path: Path, word: str) -> Path:
    """The held-out text: a path relative to the suite, or the name of a corpus that comes with quantlab."""
    return locate(word, "corpus", beside=path.parent, where=f"{path}, text.corpus")


def _check_metric(wanted: SuiteTask, task: Task, path: Path) -> None:
    if wanted.metric is not None and wanted.metric not in task.metrics:
        raise EvaluationError(
            "the task has no such metric",
            where=f"{path}, {wanted.task}",
            found=f"`{wanted.metric}`",
            fix=nearest(wanted.metric, task.metrics),
        )
