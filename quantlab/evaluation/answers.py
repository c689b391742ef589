"""The tasks of a suite, answered by one artifact: offline tasks by likelihood here, others through lm-eval."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from quantlab.errors import EvaluationError
from quantlab.evaluation import harness
from quantlab.evaluation.jobs import Progress, TasksRequest, TasksResult
from quantlab.evaluation.likelihood import Likelihood, encode, likelihoods
from quantlab.evaluation.scores import ItemScores, keep_scores, kept_scores, summarise_task
from quantlab.evaluation.suite import LoadedSuite, SuiteTask, load_suite
from quantlab.evaluation.tasks import Item, LoadedTask, Metric
from quantlab.evaluation.text import load_tokenizer
from quantlab.runtime.load import load


@dataclass(frozen=True)
class Answering:
    """A loaded model and how it reads text.

    Attributes:
        model: from `runtime.load`.
        tokenizer: as from `load_tokenizer`.
        prefix: ids that every text begins with.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    prefix: tuple[int, ...]


def measure_tasks(request: TasksRequest, progress: Progress) -> TasksResult:
    """Answer every task of the suite; a task that cannot be answered costs that task alone.

    Raises:
        QuantlabError: the artifact or its tokenizer cannot be used.
    """
    loaded = load_suite(request.suite)
    progress("loading", 0, 0)
    tokenizer, prefix = load_tokenizer(request.directory)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[loaded.suite.text.dtype]
    answering = Answering(load(request.directory, dtype=dtype, device=request.device), tokenizer, prefix)
    baseline = kept_scores(request.predictions, request.key) if request.role == "compared" else None
    found: list[ItemScores] = []
    failures: dict[str, str] = {}
    results = []
    for wanted in loaded.suite.tasks:
        for seed in wanted.seeds:
            try:
                scores = answer(answering, loaded, wanted, seed, progress)
                twin = _twin(scores, baseline)
                results.append(summarise_task(scores, twin))
                found.append(scores)
            except EvaluationError as error:
                failures[wanted.task] = str(error).replace("\n  ", "; ")
    if request.role == "baseline":
        keep_scores(request.predictions, request.key, found)
    return TasksResult(tasks=tuple(results), failures=failures)


def answer(answering: Answering, loaded: LoadedSuite, wanted: SuiteTask, seed: int, progress: Progress) -> ItemScores:
    """The scores of one task."""
    if not wanted.ours:
        definitions = loaded.path.parent / wanted.definitions if wanted.definitions else None
        answerer = harness.Answerer(answering.model, answering.tokenizer, answering.prefix, seed)
        return harness.answer(answerer, wanted, definitions)
    task = loaded.tasks[wanted.task]

    def told(done: int, total: int) -> None:
        progress(task.task.name, done, total)

    items = task.drawn(wanted.items, seed)
    encoded = [
        [encode(answering.tokenizer, answering.prefix, item.context, choice) for choice in item.choices]
        for item in items
    ]
    answers = likelihoods(answering.model, encoded, progress=told)
    return item_scores(task, wanted, seed, items, answers)


def item_scores(
    task: LoadedTask, wanted: SuiteTask, seed: int, items: Sequence[Item], answers: Sequence[Sequence[Likelihood]]
) -> ItemScores:
    """Right or wrong for each item, with what names the task."""
    metric = next(name for name in task.task.metrics if wanted.metric in {None, name})
    return ItemScores(
        name=task.task.name,
        version=str(task.task.version),
        metric=metric,
        random_baseline=task.task.random_baseline,
        seed=seed,
        data_sha256=task.sha256,
        documents=tuple(item.document for item in items),
        groups=tuple(item.group for item in items),
        scores=tuple(score_item(item, given, metric) for item, given in zip(items, answers, strict=True)),
    )


def score_item(item: Item, answers: Sequence[Likelihood], metric: Metric) -> float:
    """1 if the item is answered rightly, else 0. Of equally likely answers the first counts as given."""
    if metric == "exact_match":
        return float(answers[item.answer].greedy)
    weights = [len(choice.encode()) if metric == "accuracy_per_byte" else 1 for choice in item.choices]
    values = [given.logprob / weight for given, weight in zip(answers, weights, strict=True)]
    return float(values.index(max(values)) == item.answer)


def _twin(found: ItemScores, baseline: Sequence[ItemScores] | None) -> ItemScores | None:
    """The baseline's scores of the same task; None where there is no baseline or it did not answer this task."""
    if baseline is None:
        return None
    same = [one for one in baseline if (one.name, one.metric, one.seed) == (found.name, found.metric, found.seed)]
    return same[0] if same else None
