"""lm-eval on our runtime: its own model class as the oracle, and our offline scores against lm-eval's on the same items."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from quantlab.checkpoint.tokenizer import load_tokenizer
from quantlab.errors import EvaluationError
from quantlab.evaluation.processes.messages import TaskAnswer, TasksRequest
from quantlab.evaluation.record import TaskResult
from quantlab.evaluation.suite import SuiteTask, load_suite
from quantlab.evaluation.tasks.lm_eval_tasks import Answerer, answer
from quantlab.evaluation.tasks.measure import measure_tasks
from quantlab.runtime.load import load
from tests.checkpoints import make_checkpoint
from tests.evaluation.conftest import WORDS, write_tokenizer

WORD_LIST = [word for words in WORDS.values() for word in words]


def items() -> list[dict[str, object]]:
    """Thirty items with choices of different lengths; some contexts are empty and some end in a space."""
    found = []
    for index in range(30):
        words = [WORD_LIST[(7 * index + 3 * step) % len(WORD_LIST)] for step in range(12)]
        context = " ".join(words[:6])
        choices = [f" {words[6]}", f" {words[7]} {words[8]}", f" {words[9]} {words[10]} {words[11]} {index}"]
        found.append(
            {"id": index, "document": f"d{index}", "context": context, "choices": choices, "answer": index % 3}
        )
    return found


CHOICE = """task: ours
dataset_path: json
dataset_kwargs: {{data_files: {path}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_bytes}}]
metadata: {{version: 3}}
"""
COMPLETION = """task: last
dataset_path: json
dataset_kwargs: {{data_files: {path}}}
test_split: train
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
metadata: {{version: 1}}
"""
WRITTEN = """task: written
dataset_path: json
dataset_kwargs: {{data_files: {path}}}
test_split: train
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
metadata: {{version: 1}}
"""
OURS = """name: {name}
version: 1
kind: {kind}
items: items.jsonl
metrics: [{metrics}]
random_baseline: 0.3
description: made up
"""


@pytest.fixture
def definitions(tmp_path: Path) -> Path:
    pytest.importorskip("lm_eval", reason="the bridge needs the extra [tasks]")
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items()))
    directory = tmp_path / "definitions"
    directory.mkdir()
    for name, text in (("ours", CHOICE), ("last", COMPLETION), ("written", WRITTEN)):
        (directory / f"{name}.yaml").write_text(text.format(path=path))
    (tmp_path / "choice.yaml").write_text(
        OURS.format(name="choice", kind="choice", metrics="accuracy, accuracy_per_byte")
    )
    (tmp_path / "completion.yaml").write_text(OURS.format(name="completion", kind="completion", metrics="exact_match"))
    return directory


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_checkpoint(tmp_path_factory.mktemp("harness") / "dense", "llama")
    write_tokenizer(directory)
    return directory


def answerer(directory: Path, *, seed: int = 0) -> Answerer:
    return Answerer(load(directory, dtype=torch.float32), *load_tokenizer(directory), seed)


def test_answers_are_those_of_lm_evals_own_model(dense: Path, definitions: Path) -> None:
    pytest.importorskip("accelerate", reason="lm-eval's own model needs it")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(dense / "tokenizer.json"), bos_token="<bos>", eos_token="<bos>"
    )
    plain = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    theirs = HFLM(pretrained=plain, tokenizer=tokenizer, batch_size=4, prefix_token_id=0, max_length=64)
    ours = answerer(dense)
    ours = Answerer(ours.model, ours.tokenizer, (), 0)  # without a prefix, as lm-eval reads text here
    ours.model.config.max_position_embeddings = 64
    ours.model.config.eos_token_id = 0

    def asked(kind: str, arguments: list[tuple[object, ...]]) -> list[Instance]:
        return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]

    pairs = [(item["context"], choice) for item in items() for choice in item["choices"]]
    pairs += [("", "the sun rose"), ("the sun ", "rose"), ("over a quiet harbour " * 20, "and nobody spoke")]
    expected = theirs.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)
    found = ours.loglikelihood(pairs)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]

    texts = ["the sun rose", "over a quiet harbour and nobody spoke " * 12]
    expected_totals = theirs.loglikelihood_rolling(
        asked("loglikelihood_rolling", [(text,) for text in texts]), disable_tqdm=True
    )
    assert ours.loglikelihood_rolling(texts) == pytest.approx(expected_totals, abs=1e-3)

    options = {"until": ["\n", " a"], "max_gen_toks": 12, "do_sample": False}
    prompts = [(text, options) for text in ("the sun", "nobody spoke of hopes or of", "def")]
    written = theirs.generate_until(asked("generate_until", prompts), disable_tqdm=True)
    assert ours.generate(prompts) == written


def results(request: TasksRequest) -> list[TaskResult]:
    """The results of all task runs; each sends a start message and then its answer."""
    told: list[TaskAnswer] = []
    measure_tasks(request, lambda *_: None, told.append)  # type: ignore[arg-type]
    assert [answer.run for answer in told] == [run for run in request.runs for _ in range(2)]
    assert all(answer.reason is None for answer in told)
    return [answer.result for answer in told if answer.result is not None]


@pytest.mark.slow
def test_our_scores_equal_lm_evals_on_the_same_items(dense: Path, definitions: Path, suite: Path) -> None:
    here = suite.parent
    (here / "both.yaml").write_text(
        suite.read_text().replace("name: tiny", "name: both")
        + "tasks:\n"
        + "  - {task: choice.yaml}\n  - {task: choice.yaml, metric: accuracy_per_byte}\n  - {task: completion.yaml}\n"
        + "  - {task: ours, metric: acc, definitions: definitions}\n  - {task: ours, metric: acc_bytes, definitions: definitions}\n"
        + "  - {task: last, definitions: definitions}\n  - {task: written, definitions: definitions, seeds: [1, 2]}\n"
    )
    kept = here / "kept.json"
    request = TasksRequest(
        directory=dense, suite=here / "both.yaml", runs=tuple(range(8)), scores=kept, role="baseline", key="k"
    )
    tasks = results(request)
    choice, acc, written = tasks[0], tasks[3], tasks[6:]
    scores = {(one["name"], one["metric"]): one["scores"] for one in json.loads(kept.read_text())["tasks"]}
    assert scores["choice", "accuracy"] == scores["ours", "acc"]
    assert scores["choice", "accuracy_per_byte"] == scores["ours", "acc_bytes"]
    assert scores["completion", "exact_match"] == scores["last", "acc"]
    assert len(set(scores["ours", "acc"])) == 2, "some right, some wrong, or equality says nothing"
    assert (acc.source, acc.version, acc.n, acc.score.value) == ("lm-eval", "3", 30, choice.score.value)
    assert [one.seed for one in written] == [1, 2]
    assert written[0].decoding == "greedy, at most 8 tokens"
    compared = results(request.model_copy(update={"role": "compared"}))
    assert all(task.loss is not None and task.loss.value == 0 for task in compared)


def test_sampled_answers_follow_their_seed(dense: Path) -> None:
    options = {"until": [], "max_gen_toks": 16, "do_sample": True, "temperature": 1.5}
    prompts = [("the sun", options), ("nobody spoke of", options)]
    state = torch.get_rng_state()
    first, again, other = (answerer(dense, seed=seed).generate(prompts) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_tasks_and_metrics_unknown_to_lm_eval_are_errors(dense: Path, definitions: Path) -> None:
    model = answerer(dense)
    with pytest.raises(EvaluationError, match="cannot run the task"):
        answer(model, SuiteTask(task="no_such_task_at_all"), definitions)
    with pytest.raises(EvaluationError, match="no such metric") as raised:
        answer(model, SuiteTask(task="ours", metric="acc_nrom"), definitions)
    assert "acc" in str(raised.value.fix)


@pytest.mark.slow
def test_a_model_that_fails_is_not_laid_on_lm_eval(
    dense: Path, definitions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = answerer(dense)

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("of the model")

    monkeypatch.setattr(model.model.base_model, "forward", fails)
    with pytest.raises(RuntimeError, match="of the model"):
        answer(model, SuiteTask(task="ours"), definitions)


@pytest.mark.slow
def test_lm_eval_knows_every_task_that_a_shipped_suite_names() -> None:
    tasks = pytest.importorskip("lm_eval.tasks", reason="the bridge needs the extra [tasks]")
    suites = sorted((Path(__file__).parents[2] / "eval" / "suites").glob("*.yaml"))
    wanted = {task.task for path in suites for task in load_suite(path).suite.tasks if not task.ours}
    assert {"mmlu", "gsm8k", "arc_challenge", "hellaswag", "winogrande", "humaneval"} <= wanted
    assert wanted <= set(tasks.TaskManager().all_tasks)


def test_without_lm_eval_a_task_says_what_to_install(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match=r"needs lm-eval") as raised:
        answer(answerer(dense), SuiteTask(task="arc_easy"), None)
    assert "quantlab[tasks]" in str(raised.value.fix)
