"""Tasks: shipped tasks equal the output of their script, invalid tasks are refused, scores are correct and paired."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantlab.errors import EvaluationError, QuantlabError, RecipeError
from quantlab.evaluation.measured import FEWEST_DEGREES
from quantlab.evaluation.suite import load_suite
from quantlab.evaluation.tasks.likelihood import Likelihood
from quantlab.evaluation.tasks.measure import score_item
from quantlab.evaluation.tasks.offline import Item, load_task
from quantlab.evaluation.tasks.scores import ItemScores, summarise_task

ROOT = Path(__file__).parents[2]
TASKS = sorted((ROOT / "eval" / "tasks").glob("*.yaml"))
TASK = "name: t\nversion: 1\nkind: choice\nitems: t.jsonl\nmetrics: [accuracy]\nrandom_baseline: 0.5\ndescription: d\n"
GOOD = {"id": 0, "document": "d", "choices": ["a", "b"], "answer": 0}


def test_the_script_builds_the_shipped_items(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "tests/tasks/build.py", tmp_path], check=True, capture_output=True)
    built = sorted(tmp_path.glob("*.jsonl"))
    assert [path.name for path in built] == sorted(path.name for path in (ROOT / "eval/tasks").glob("*.jsonl"))
    for path in built:
        assert path.read_bytes() == (ROOT / "eval/tasks" / path.name).read_bytes()


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_shipped_tasks_load_and_are_described(path: Path) -> None:
    task = load_task(path)
    assert task.task.name == path.stem
    readme = (path.parent / "README.md").read_text()
    assert f"## {task.task.name}\n" in readme
    assert f"{task.task.random_baseline:g}" in readme.partition(f"## {task.task.name}\n")[2].partition("\n## ")[0]
    assert len(task.items) >= (150 if path.stem == "retrieval" else 500)
    if path.stem == "retrieval":  # few items: of each length enough documents for an interval of its own
        documents = {
            group: {item.document for item in task.items if item.group == group} for group in ("512", "1024", "2048")
        }
        assert min(map(len, documents.values())) > FEWEST_DEGREES
    answers = [item.answer for item in task.items]
    choices = len(task.items[0].choices)
    assert all(len(item.choices) == choices and len(set(item.choices)) == choices for item in task.items)
    # no place of the right answer is favoured
    assert all(0.7 < answers.count(place) * choices / len(answers) < 1.3 for place in range(choices))


def test_items_come_from_held_out_text_and_distractors_from_the_same_document() -> None:
    corpus = [json.loads(line) for line in (ROOT / "eval/corpora/heldout.jsonl").read_text().split("\n") if line]
    texts: dict[str, str] = {}
    for document in corpus:
        name = document["id"].partition("#")[0]
        texts[name] = texts.get(name, "") + "\n" + document["text"]
    for item in load_task(ROOT / "eval/tasks/continuation.yaml").items:
        text = texts[item.document]
        assert item.context + item.choices[item.answer] in text
        assert all(choice in text for choice in item.choices)
    for item in load_task(ROOT / "eval/tasks/last_word.yaml").items:
        word = item.choices[0].strip()
        assert re.search(re.escape(item.context + " " + word) + r"[.?!;:]", texts[item.document])
        assert re.search(rf"\b{word}\b", item.context)


def test_the_planted_line_stands_once_and_answers_the_question() -> None:
    for item in load_task(ROOT / "eval/tasks/retrieval.yaml").items:
        question = item.context.rpartition("\n\n")[2]
        assert item.context.count(question + item.choices[item.answer] + ".") == 1
        assert item.context.count(question) == 2


BAD_TASKS = {
    "unknown metric": (TASK.replace("[accuracy]", "[acuracy]"), json.dumps(GOOD), RecipeError, "accuracy"),
    "metric of another kind": (TASK.replace("[accuracy]", "[exact_match]"), json.dumps(GOOD), RecipeError, "no metric"),
    "unknown kind": (TASK.replace("choice", "chioce"), json.dumps(GOOD), RecipeError, "choice"),
    "no version": (TASK.replace("version: 1\n", ""), json.dumps(GOOD), RecipeError, "version"),
    "empty": (TASK, "\n", EvaluationError, "the task is empty"),
    "no JSON": (TASK, "{", EvaluationError, "malformed"),
    "answer out of range": (TASK, json.dumps(GOOD | {"answer": 2}), EvaluationError, "2 choices, answer 2"),
    "one choice": (TASK, json.dumps(GOOD | {"choices": ["a"]}), EvaluationError, "1 choices"),
    "empty choice": (TASK, json.dumps(GOOD | {"choices": ["a", ""]}), EvaluationError, "malformed"),
    "unknown key": (TASK, json.dumps(GOOD | {"gold": 1}), EvaluationError, "gold"),
    "an id twice": (TASK, json.dumps(GOOD) + "\n" + json.dumps(GOOD), EvaluationError, "an id that another item has"),
}


@pytest.mark.parametrize("name", BAD_TASKS)
def test_bad_tasks_are_refused_with_what_to_do(name: str, tmp_path: Path) -> None:
    yaml, items, kind, message = BAD_TASKS[name]
    (tmp_path / "t.yaml").write_text(yaml)
    (tmp_path / "t.jsonl").write_text(items)
    with pytest.raises(kind, match=re.escape(message)) as raised:
        load_task(tmp_path / "t.yaml")
    assert raised.value.where is not None
    assert raised.value.fix is not None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{task: absent.yaml}", "cannot be read"),
        ("{task: t.yaml, metric: acc}", "no such metric"),
        ("{task: t.yaml, shots: 5}", "leave out shots"),
        ("{task: t.yaml, items: 0}", "range"),
        ("{tusk: t.yaml}", "unknown key"),
    ],
)
def test_a_suite_refuses_what_a_task_cannot_do(entry: str, message: str, suite: Path) -> None:
    (suite.parent / "t.yaml").write_text(TASK)
    (suite.parent / "t.jsonl").write_text(json.dumps(GOOD))
    suite.write_text(suite.read_text() + f"tasks: [{entry}]\n")
    with pytest.raises(QuantlabError, match=message):
        load_suite(suite)


def test_changing_an_item_changes_the_suite(suite: Path) -> None:
    (suite.parent / "t.yaml").write_text(TASK)
    hashes = set()
    for answer in (0, 1):
        (suite.parent / "t.jsonl").write_text(json.dumps(GOOD | {"answer": answer}))
        path = suite.with_name("with.yaml")
        path.write_text(suite.read_text() + "tasks: [{task: t.yaml}]\n")
        hashes.add(load_suite(path).sha256)
    assert len(hashes) == 2


def test_items_are_drawn_from_all_groups_alike() -> None:
    task = load_task(ROOT / "eval/tasks/grammar.yaml")
    drawn = task.drawn(80, seed=0)
    assert len({item.id for item in drawn}) == 80
    groups = [item.group for item in drawn]
    assert {groups.count(group) for group in groups} == {10}
    assert drawn == task.drawn(80, seed=0)
    assert drawn != task.drawn(80, seed=1)
    assert task.drawn(None, seed=1) == task.items


def test_metrics_of_one_item() -> None:
    item = Item(id=0, document="d", choices=("ab", "abcdefgh"), answer=1)
    answers = [Likelihood(-2.0, True, 1), Likelihood(-4.0, False, 3)]
    assert score_item(item, answers, "accuracy") == 0
    assert score_item(item, answers, "accuracy_per_byte") == 1
    assert score_item(item, answers, "exact_match") == 0


def scored(scores: list[float], **fields: object) -> ItemScores:
    documents = tuple(f"d{index // 2}" for index in range(len(scores)))
    values = {"name": "t", "version": "1", "metric": "accuracy", "groups": ("",) * len(scores), "documents": documents}
    return ItemScores.model_validate(values | {"scores": tuple(scores)} | fields)


def test_a_loss_is_paired_and_flips_are_counted() -> None:
    baseline = scored([1.0] * 30 + [0.0] * 10)
    found = scored([0.0, 1.0] * 12 + [1.0] * 6 + [1.0] * 2 + [0.0] * 8)
    result = summarise_task(found, baseline)
    assert (result.n, result.score.value, result.baseline_score) == (40, 0.5, 0.75)
    assert result.loss is not None
    assert result.loss.value == pytest.approx(0.25)
    assert (result.to_wrong, result.to_right) == (12, 2)
    assert result.significance is not None
    assert result.significance.p == pytest.approx(2 * (1 + 14 + 91) / 2**14)
    assert result.significance.verdict == "loss"
    same = summarise_task(baseline, baseline)
    assert same.loss is not None
    assert (same.loss.value, same.loss.low, same.loss.high) == (0, 0, 0)
    assert same.significance is not None
    assert (same.significance.p, same.significance.verdict) == (1, "no measurable loss")
    assert summarise_task(found, None).loss is None


def test_higher_scores_are_losses_where_lower_is_better() -> None:
    baseline = scored([1.0 + 0.1 * index for index in range(24)], higher_is_better=False)
    found = baseline.model_copy(update={"scores": tuple(score + 0.5 + 0.01 * score for score in baseline.scores)})
    result = summarise_task(found, baseline)
    assert result.loss is not None
    assert result.loss.value == pytest.approx(0.5215, abs=1e-4)
    assert result.to_wrong is None
    assert result.significance is not None
    assert result.significance.verdict == "loss"


def test_scores_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(EvaluationError, match="not a number") as raised:
        summarise_task(scored([1.0] * 38 + [float("nan"), float("inf")], metric="bits"), None)
    assert raised.value.found == "2 of 40 items"
    assert "bits" in str(raised.value.fix)


def test_other_items_than_the_baselines_are_an_error() -> None:
    with pytest.raises(EvaluationError, match="answered different items"):
        summarise_task(scored([1.0] * 20), scored([1.0] * 20, version="2"))
    with pytest.raises(EvaluationError, match="too few items"):
        summarise_task(scored([1.0] * 8), None)
