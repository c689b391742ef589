"""Tasks of lm-eval (MMLU, GSM8K, ARC …) on our runtime's model, by their lm-eval names.

lm-eval provides the tasks: data, prompts, examples and the scoring of answers. It makes three kinds of requests to a model, which
are answered here with the packed weights: log-likelihoods of continuations, log-likelihoods of whole texts, and generated text.
Scores are kept per item, so that losses are paired with the baseline as for any other task.

lm-eval is an optional dependency, imported only if a suite names one of its tasks. It downloads its data itself; offline (the
default; HF_HUB_OFFLINE=0 permits downloads) it uses its cache.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from quantlab.checkpoint.tokenizer import text_tokens
from quantlab.documents import nearest
from quantlab.errors import EvaluationError
from quantlab.evaluation.quality.predictions import BATCH_TOKENS
from quantlab.evaluation.suite import SuiteTask
from quantlab.evaluation.tasks.likelihood import Text, encode, likelihoods
from quantlab.evaluation.tasks.scores import ItemScores

_NEW_TOKENS = 256  # lm-eval's own default
_CONTEXT = 2048  # for a config without max_position_embeddings
_PROBLEMS = (KeyError, ValueError, OSError, RuntimeError, ImportError, AttributeError)
"""Exceptions that lm-eval and its data libraries raise for a task that is unknown or cannot be downloaded or run."""


class Answers(Protocol):
    """What lm-eval asks of a model: its three kinds of requests, and the seed of sampled answers."""

    @property
    def seed(self) -> int: ...

    def loglikelihood(self, pairs: Sequence[tuple[str, str]], /) -> list[tuple[float, bool]]: ...

    def loglikelihood_rolling(self, texts: Sequence[str], /) -> list[float]: ...

    def generate(self, prompts: Sequence[tuple[str, Mapping[str, Any]]], /) -> list[str]: ...


@dataclass(frozen=True)
class Answerer:
    """Answers the three kinds of lm-eval requests.

    Attributes:
        model: a causal language model.
        tokenizer: as from `load_tokenizer`.
        prefix: token ids that every text begins with.
        seed: seed of sampled answers.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    prefix: tuple[int, ...]
    seed: int = 0

    @property
    def longest(self) -> int:
        """The model's context length in tokens."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or _CONTEXT)

    @property
    def before(self) -> tuple[int, ...]:
        """The tokens of an empty context: the prefix, or the end-of-sequence token if the tokenizer has no prefix."""
        end = self.model.config.eos_token_id
        return self.prefix or (int(end[0] if isinstance(end, list) else end or 0),)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Log-probability in nats of each (context, continuation), and whether greedy decoding would produce the continuation."""
        items: list[list[Text]] = []
        context: str | None = None
        for begin, continuation in pairs:
            prefix = self.prefix if begin else self.before
            text = _shortened(encode(self.tokenizer, prefix, begin, continuation), self.longest)
            if begin != context or not items:
                items.append([])
            items[-1].append(text)
            context = begin
        return [(one.logprob, one.greedy) for found in likelihoods(self.model, items) for one in found]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-probability in nats of each whole text, in windows of the context length; the last window is extended to the left."""
        windows = [list(self._windows(text)) for text in texts]
        found = iter(likelihoods(self.model, [[window] for text in windows for window in text]))
        return [sum(next(found)[0].logprob for _ in text) for text in windows]

    def _windows(self, text: str) -> Iterator[Text]:
        tokens = (*self.before, *text_tokens(self.tokenizer, self.prefix, text))
        start = len(self.before)
        for first in range(start, len(tokens), self.longest):
            stop = min(first + self.longest, len(tokens))
            begin = max(stop - self.longest - 1, 0)  # the last token is not read
            yield Text(tokens[begin:stop], first - begin)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The text that the model generates after each context, cut at the first stop string."""
        answers = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index][0]))
        while order:
            options = prompts[order[0]][1]
            new = int(options.get("max_gen_toks", _NEW_TOKENS))
            room = max(self.longest - new, 1)
            rows = max(BATCH_TOKENS // (min(len(prompts[order[0]][0]), room) + new), 1)
            batch = [index for index in order[:rows] if prompts[index][1] == options]
            order = [index for index in order if index not in set(batch)]
            encoded = [self._prompt(prompts[index][0])[-room:] for index in batch]
            for index, answer in zip(batch, self._write(encoded, options, new), strict=True):
                answers[index] = answer
        return answers

    def _prompt(self, context: str) -> list[int]:
        return [
            *(self.prefix if context else self.before),
            *text_tokens(self.tokenizer, self.prefix, context),
        ]

    def _write(self, prompts: Sequence[Sequence[int]], options: Mapping[str, Any], new: int) -> list[str]:
        """Generate the answers of one batch, padded on the left."""
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)

        def finished(found: Tensor, _: object, **__: object) -> Tensor:
            done = [any(stop in text for stop in stops) for text in self._decoded(found[:, longest:])]
            return torch.tensor(done, device=found.device)

        sampled = float(options.get("temperature") or 0) > 0 and options.get("do_sample", True)
        drawing = (
            {"temperature": float(options["temperature"]), "top_p": float(options.get("top_p", 1.0))} if sampled else {}
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            found = self.model.generate(
                ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=new,
                do_sample=sampled,
                pad_token_id=self.before[0],
                stopping_criteria=[finished],
                **drawing,
            )
        return [_cut(text, stops) for text in self._decoded(found[:, longest:])]

    def _decoded(self, tokens: Tensor) -> list[str]:
        return [str(self.tokenizer.decode(row)) for row in tokens.tolist()]


def _shortened(text: Text, longest: int) -> Text:
    """Without what the context has no room for, on the left; the last token is not read."""
    gone = min(max(len(text.tokens) - 1 - longest, 0), text.first - 1)
    return Text(text.tokens[gone:], text.first - gone)


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop, 1)[0] if stop else text
    return text


def as_lm_eval(answerer: Answers) -> Any:  # noqa: ANN401 - a class of a package that may be missing
    """The answerer as lm-eval's `LM`. Its attribute `answering` stays true if the model raised an error."""
    from lm_eval.api.model import LM

    class QuantlabLM(LM):  # type: ignore[misc]
        answering = False

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return self._answer(answerer.loglikelihood, [request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return self._answer(answerer.loglikelihood_rolling, [request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return self._answer(answerer.generate, [request.args for request in requests])

        def _answer(self, answer: Callable[[Any], list[Any]], questions: list[Any]) -> list[Any]:
            self.answering = True
            found = answer(questions)
            self.answering = False
            return found

    return QuantlabLM()


def answer(answerer: Answers, wanted: SuiteTask, definitions: Path | None) -> ItemScores:
    """Run one task or group of lm-eval's.

    Args:
        answerer: the model.
        wanted: the task's entry in the suite.
        definitions: directory of additional task files.

    Raises:
        EvaluationError: lm-eval is not installed, does not know the task or its metric, or cannot load its data.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise EvaluationError(
            "the task needs lm-eval",
            where=f"task {wanted.task}",
            found=str(error),
            fix="pip install 'quantlab[tasks]', or name a file of eval/tasks",
        ) from error
    model = as_lm_eval(answerer)
    writing = {"temperature": wanted.temperature, "top_p": wanted.top_p, "do_sample": wanted.temperature > 0}
    try:
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=[wanted.task],
            num_fewshot=wanted.shots,
            limit=wanted.items,
            bootstrap_iters=0,
            log_samples=True,
            gen_kwargs=writing | ({"max_gen_toks": wanted.max_tokens} if wanted.max_tokens else {}),
            task_manager=_known_tasks(definitions),
            random_seed=answerer.seed,
            numpy_random_seed=answerer.seed,
            torch_random_seed=answerer.seed,
            fewshot_random_seed=answerer.seed,
            confirm_run_unsafe_code=wanted.run_code,
        )
    except _PROBLEMS as error:
        if model.answering:
            raise
        raise EvaluationError(
            "lm-eval cannot run the task",
            where=f"task {wanted.task}",
            found=f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}",
            fix="check its name with `lm-eval ls tasks`; where its data must be fetched first, run with HF_HUB_OFFLINE=0",
        ) from error
    return _item_scores(found, wanted, answerer.seed)


@functools.cache
def _known_tasks(definitions: Path | None) -> Any:  # noqa: ANN401 - a class of a package that may be missing
    """lm-eval's task index, cached because building it takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(definitions) if definitions else None)


def _item_scores(found: Mapping[str, Any], wanted: SuiteTask, seed: int) -> ItemScores:
    """Convert lm-eval's samples. If answers have several filters, the first is used unless the metric is `metric,filter`."""
    name, _, filtered = (wanted.metric or "").partition(",")
    metric = name or _first_metric(found)
    digest = hashlib.sha256()
    documents, groups, scores = [], [], []
    for task, samples in sorted(found["samples"].items()):
        kept = filtered or (samples[0]["filter"] if samples else "")
        for sample in samples:
            if sample["filter"] != kept:
                continue
            if not isinstance(sample.get(metric), int | float):
                raise EvaluationError(
                    "the task has no such metric per item",
                    where=f"task {wanted.task}",
                    found=f"`{metric}`",
                    fix=nearest(metric, sorted(sample.get("metrics", []))),
                )
            digest.update(f"{sample['doc_hash']} {sample['prompt_hash']} {sample['target_hash']}\n".encode())
            documents.append(f"{task}/{sample['doc_id']}")
            groups.append(task)
            scores.append(float(sample[metric]))
    versions = sorted({str(found["versions"].get(task)) for task in found["samples"]})
    config = next(iter(found["configs"].values()))
    better = next(iter(found["higher_is_better"].values())).get(metric)
    return ItemScores(
        name=wanted.task,
        version=", ".join(versions),
        source="lm-eval",
        metric=f"{metric},{filtered}" if filtered else metric,
        higher_is_better=better is not False,
        decoding=_decoding(config, wanted),
        shots=int(next(iter(found["n-shot"].values()), 0) or 0),
        seed=seed,
        data_sha256=digest.hexdigest(),
        documents=tuple(documents),
        groups=tuple(groups),
        scores=tuple(scores),
    )


def _first_metric(found: Mapping[str, Any]) -> str:
    samples = next(iter(found["samples"].values()))
    return str(samples[0]["metrics"][0]) if samples else ""


def _decoding(config: Mapping[str, Any], wanted: SuiteTask) -> str:
    if config.get("output_type") != "generate_until":
        return "log-likelihood"
    most = (config.get("generation_kwargs") or {}).get("max_gen_toks", _NEW_TOKENS)
    how = f"temperature {wanted.temperature:g}, top-p {wanted.top_p:g}" if wanted.temperature else "greedy"
    return f"{how}, at most {most} tokens"
