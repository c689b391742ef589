"""Offline tasks: versioned data under eval/tasks, scored by the likelihood of given answers.

A task consists of a YAML file that describes it and its scoring, and a JSON lines file with its items. Every result carries the
hash of both files. A change that alters scores increments the version.
"""

import codecs
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quantlab.documents import load_document
from quantlab.errors import EvaluationError

Kind = Literal["choice", "completion"]
Metric = Literal["accuracy", "accuracy_per_byte", "exact_match"]
_METRICS: dict[Kind, tuple[Metric, ...]] = {
    "choice": ("accuracy", "accuracy_per_byte"),
    "completion": ("exact_match",),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Task(_Strict):
    """The description of a task and of its scoring."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)
    """The task's name, equal to the file name without suffix."""
    version: int = Field(gt=0)
    """Incremented by every change that alters scores."""
    kind: Kind
    """choice: select the most likely of several answers. completion: check whether greedy decoding produces the answer."""
    items: str = Field(min_length=1)
    """Name of the JSON lines file in the same directory."""
    metrics: tuple[Metric, ...] = Field(min_length=1)
    """accuracy: the most likely answer is correct. accuracy_per_byte: the same with log-likelihoods divided by the answers' UTF-8
    bytes, so that long answers are not penalized. exact_match: each token of the answer is the most likely one."""
    random_baseline: float = Field(ge=0, le=1)
    """Expected score of random guessing."""
    description: str = Field(min_length=1)
    """One sentence of description."""

    @model_validator(mode="after")
    def _fits(self) -> "Task":
        wrong = [metric for metric in self.metrics if metric not in _METRICS[self.kind]]
        if wrong:
            raise ValueError(
                f"a task of kind {self.kind} has no metric `{wrong[0]}`; use {', '.join(_METRICS[self.kind])}"
            )
        return self


class Item(_Strict):
    """One question."""

    id: int
    """Its number in the file."""
    document: str
    """The text that the item was made from; items of one text are not independent."""
    group: str = ""
    """Group whose score is also reported separately."""
    context: str = ""
    """The text before the answer."""
    choices: tuple[str, ...] = Field(min_length=1)
    """Possible answers."""
    answer: int = Field(ge=0)
    """Index of the correct choice."""


@dataclass(frozen=True)
class LoadedTask:
    """A task and its items.

    Attributes:
        task: the task's description.
        items: its items, at least one.
        sha256: hash of both files.
    """

    task: Task
    items: tuple[Item, ...]
    sha256: str

    def drawn(self, count: int | None, seed: int) -> tuple[Item, ...]:
        """A sample of `count` items, balanced over the groups, in an order set by the seed; all items if None."""
        if count is None or count >= len(self.items):
            return self.items
        random = Random(seed)  # noqa: S311 - sampling, not cryptography
        groups: dict[str, list[tuple[float, int, Item]]] = {}
        for item in self.items:
            groups.setdefault(item.group, []).append((random.random(), item.id, item))
        queues = [[entry[2] for entry in sorted(group, key=lambda entry: entry[:2])] for group in groups.values()]
        turns = [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]
        return tuple(turns[:count])


def load_task(path: Path) -> LoadedTask:
    """Read and check a task.

    Raises:
        RecipeError: the YAML file cannot be read or has an invalid field, such as an unknown metric.
        EvaluationError: the items cannot be read or are malformed, or there are none.
    """
    task, content = load_document(path, Task, kind="task")
    digest = hashlib.sha256(hashlib.sha256(content).digest())
    file = path.parent / task.items
    try:
        data = file.read_bytes()
    except OSError as error:
        raise EvaluationError(
            "the items of a task cannot be read",
            where=str(file),
            found=error.strerror,
            fix=f"correct `items` in {path}",
        ) from error
    digest.update(hashlib.sha256(data).digest())
    items = _items(data, file, task)
    return LoadedTask(task, items, digest.hexdigest())


def _items(data: bytes, file: Path, task: Task) -> tuple[Item, ...]:
    numbered = enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1)
    lines = [(number, line) for number, line in numbered if line.strip()]
    if not lines:
        raise EvaluationError(
            "the task is empty", where=str(file), found="no items", fix="write one JSON object per line"
        )
    items = []
    for number, line in lines:
        try:
            item = Item.model_validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise _malformed(file, number, f"{field}: {first['msg']}" if field else first["msg"]) from error
        fewest = 2 if task.kind == "choice" else 1
        if len(item.choices) < fewest or item.answer >= len(item.choices) or not all(item.choices):
            raise _malformed(file, number, f"{len(item.choices)} choices, answer {item.answer}")
        items.append(item)
    if len({item.id for item in items}) < len(items):
        raise _malformed(file, lines[-1][0], "an id that another item has")
    return tuple(items)


def _malformed(file: Path, line: int, found: str) -> EvaluationError:
    example = json.dumps(
        {"id": 0, "document": "…", "context": "…", "choices": ["…", "…"], "answer": 0}, ensure_ascii=False
    )
    return EvaluationError(
        "an item is malformed", where=f"{file}:{line}", found=found, fix=f"write objects like {example}"
    )
