"""The tasks of a suite, answered by one artifact: offline tasks by likelihood, the others through lm-eval."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from quantlab.checkpoint.tokenizer import load_tokenizer
from quantlab.errors import EvaluationError
from quantlab.evaluation.processes.messages import Progress, SendPart, TaskAnswer, TasksRequest, TasksResult
from quantlab.evaluation.suite import LoadedSuite, TaskRun, load_suite
from quantlab.evaluation.tasks import lm_eval_tasks
from quantlab.evaluation.tasks.likelihood import Likelihood, encode, likelihoods
from quantlab.evaluation.tasks.offline import Item, Metric
from quantlab.evaluation.tasks.scores import ItemScores, same_task, save_scores, saved_scores, summarise_task
from quantlab.runtime.load import load

NO_BASELINE = "nothing to compare with: the baseline did not answer it"


@dataclass(frozen=True)
class Answering:
    """A loaded model with its tokenizer.

    Attributes:
        model: from `runtime.load`.
        tokenizer: as from `load_tokenizer`.
        prefix: token ids that every text begins with.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    prefix: tuple[int, ...]


def measure_tasks(request: TasksRequest, progress: Progress, send: SendPart) -> TasksResult:
    """Answer tasks of the suite with one load of the model. A task that cannot be answered does not affect the others.

    Raises:
        QuantlabError: the artifact or its tokenizer cannot be used.
    """
    loaded = load_suite(request.suite)
    progress("loading", 0, 0)
    tokenizer, prefix = load_tokenizer(request.directory)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[loaded.suite.text.dtype]
    answering = Answering(load(request.directory, dtype=dtype, device=request.device), tokenizer, prefix)
    for number in request.runs:
        send(TaskAnswer(run=number))
        try:
            scores = answer(answering, loaded, loaded.runs[number], progress)
            send(_task_answer(request, number, scores))
        except EvaluationError as error:
            send(TaskAnswer(run=number, reason=str(error).replace("\n  ", "; ")))
    return TasksResult(answered=len(request.runs))


def _task_answer(request: TasksRequest, number: int, scores: ItemScores) -> TaskAnswer:
    """The answer for the record. The baseline's scores are stored; those of other artifacts are compared with them."""
    if request.role == "baseline":
        result = summarise_task(scores, None)
        save_scores(request.scores, request.key, scores)
        return TaskAnswer(run=number, result=result)
    baseline = same_task(scores, saved_scores(request.scores, request.key))
    reason = NO_BASELINE if baseline is None else None
    return TaskAnswer(run=number, result=summarise_task(scores, baseline), reason=reason)


def answer(answering: Answering, loaded: LoadedSuite, run: TaskRun, progress: Progress) -> ItemScores:
    """The scores of one task."""
    wanted = run.wanted
    if not wanted.ours:
        answerer = lm_eval_tasks.Answerer(answering.model, answering.tokenizer, answering.prefix, run.seed)
        return lm_eval_tasks.answer(answerer, wanted, loaded.definitions(wanted))
    task = loaded.tasks[wanted.task]

    def on_progress(done: int, total: int) -> None:
        progress(run.name, done, total)

    items = task.drawn(wanted.items, run.seed)
    encoded = [
        [encode(answering.tokenizer, answering.prefix, item.context, choice) for choice in item.choices]
        for item in items
    ]
    answers = likelihoods(answering.model, encoded, progress=on_progress)
    metric = next(name for name in task.task.metrics if name == run.metric)
    return ItemScores(
        name=task.task.name,
        version=str(task.task.version),
        metric=metric,
        random_baseline=task.task.random_baseline,
        seed=run.seed,
        data_sha256=task.sha256,
        documents=tuple(item.document for item in items),
        groups=tuple(item.group for item in items),
        scores=tuple(score_item(item, given, metric) for item, given in zip(items, answers, strict=True)),
    )


def score_item(item: Item, answers: Sequence[Likelihood], metric: Metric) -> float:
    """1 if the item is answered correctly, else 0. Among equally likely answers, the first is the model's answer."""
    if metric == "exact_match":
        return float(answers[item.answer].greedy)
    weights = [len(choice.encode()) if metric == "accuracy_per_byte" else 1 for choice in item.choices]
    values = [given.logprob / weight for given, weight in zip(answers, weights, strict=True)]
    return float(values.index(max(values)) == item.answer)
