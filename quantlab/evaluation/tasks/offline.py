"""Offline tasks: versioned data under eval/tasks, scored by the likelihood of given answers.

A task is a YAML file that says what it is and how it is scored, and a file of JSON lines with its items. Changing either
changes the hash that every result carries; a change that alters scores raises the version.
"""

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
    """What a task is and how it is scored."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)
    """The task's name; the file's, without its suffix."""
    version: int = Field(gt=0)
    """Raised by every change that alters scores."""
    kind: Kind
    """choice: which of some answers is likelier. completion: is the answer what the model would write."""
    items: str = Field(min_length=1)
    """JSON lines beside this file."""
    metrics: tuple[Metric, ...] = Field(min_length=1)
    """accuracy: the likeliest answer is right. accuracy_per_byte: the same with log-likelihoods divided by the answers' UTF-8
    bytes, so that long answers are not at a loss. exact_match: each token of the answer is the most likely one."""
    random_baseline: float = Field(ge=0, le=1)
    """Score of guessing."""
    description: str = Field(min_length=1)
    """One sentence for people."""

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
    """The text it was made from: items of one text are not independent."""
    group: str = ""
    """What its score is also reported by."""
    context: str = ""
    """What the model reads first."""
    choices: tuple[str, ...] = Field(min_length=1)
    """Possible answers."""
    answer: int = Field(ge=0)
    """Index of the right one."""


@dataclass(frozen=True)
class LoadedTask:
    """A task and its items.

    Attributes:
        task: what the file says.
        items: at least one.
        sha256: hash of both files.
    """

    task: Task
    items: tuple[Item, ...]
    sha256: str

    def drawn(self, count: int | None, seed: int) -> tuple[Item, ...]:
        """`count` of the items, as many of each group as there are (all if None), in an order that the seed sets."""
        if count is None or count >= len(self.items):
            return self.items
        random = Random(seed)  # noqa: S311 - a sample, no secret
        groups: dict[str, list[tuple[float, int, Item]]] = {}
        for item in self.items:
            groups.setdefault(item.group, []).append((random.random(), item.id, item))
        queues = [[entry[2] for entry in sorted(group, key=lambda entry: entry[:2])] for group in groups.values()]
        turns = [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]
        return tuple(turns[:count])


def load_task(path: Path) -> LoadedTask:
    """Read and check a task.

    Raises:
        RecipeError: the YAML file cannot be read or says something a task cannot say: an unknown metric, for example.
        EvaluationError: the items cannot be read, are malformed, or there are none.
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
    lines = [line for line in data.split(b"\n") if line.strip()]
    if not lines:
        raise EvaluationError(
            "the task is empty", where=str(file), found="no items", fix="write one JSON object per line"
        )
    items = []
    for number, line in enumerate(lines, start=1):
        try:
            item = Item.model_validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise _malformed(file, number, f"{place}: {first['msg']}" if place else first["msg"]) from error
        fewest = 2 if task.kind == "choice" else 1
        if len(item.choices) < fewest or item.answer >= len(item.choices) or not all(item.choices):
            raise _malformed(file, number, f"{len(item.choices)} choices, answer {item.answer}")
        items.append(item)
    if len({item.id for item in items}) < len(items):
        raise _malformed(file, len(items), "an id that another item has")
    return tuple(items)


def _malformed(file: Path, line: int, found: str) -> EvaluationError:
    example = json.dumps(
        {"id": 0, "document": "…", "context": "…", "choices": ["…", "…"], "answer": 0}, ensure_ascii=False
    )
    return EvaluationError(
        "an item is malformed", where=f"{file}:{line}", found=found, fix=f"write objects like {example}"
    )
