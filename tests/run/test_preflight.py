"""What a run needs is tried before its first block: exit code 1, where, found and fix, nothing in artifacts/."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quantlab import cli
from quantlab.checkpoint.index import open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.errors import ArtifactError, CheckpointError, EvaluationError, QuantlabError
from quantlab.evaluation.processes.messages import TrialRequest
from quantlab.evaluation.processes.worker_client import CellError, Worker
from quantlab.evaluation.tasks.trial import try_tasks
from quantlab.evaluation.verify import _check_finite
from quantlab.formats.stored import StoredWeights
from quantlab.plan.compile import compile_plan
from quantlab.preflight import check_before_running
from quantlab.recipe.load import load_recipe
from quantlab.run import loop
from quantlab.run.directory import RunDirectory
from quantlab.texts.locate import Commits
from tests.checkpoints import make_checkpoint
from tests.run.test_calibrated import run, with_tokenizer, write_recipe

GPTQ = "  v: [{quantize: int4_g128, algorithm: {name: gptq}}]\n"
SUITE = """\
name: tiny
version: 1
text: {corpus: heldout.jsonl, length: 32, tokens_per_domain: 200, dtype: float32}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return with_tokenizer(make_checkpoint(tmp_path / "model", "llama"))


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    path = write_recipe(tmp_path, model, "  v: [{cast: float16}]\n")
    texts = [{"domain": f"d{n % 2}", "text": " ".join(f"w{n + k + 1}" for k in range(60))} for n in range(12)]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    (tmp_path / "suite.yaml").write_text(SUITE)
    path.write_text(path.read_text() + "evaluate: {suite: suite.yaml, baseline: source}\n")
    return path


def add_tensor(model: Path, name: str) -> None:
    path = model / "model.safetensors"
    save_file({**load_file(path), name: torch.ones(384)}, path, metadata={"format": "pt"})


def drop_tensor(model: Path, name: str) -> None:
    path = model / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != name}, path, metadata={"format": "pt"})


def edit_config(model: Path, **fields: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bias of the head": (lambda model: add_tensor(model, "lm_head.bias"), "lm_head.bias"),
    "a value head": (lambda model: add_tensor(model, "v_head.summary.weight"), "v_head.summary.weight"),
    "an unknown rope type": (
        lambda model: edit_config(model, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
        "spiral",
    ),
    "a model type that nothing knows under a known class": (
        lambda model: edit_config(model, model_type="mystery"),
        "mystery",
    ),
    "a missing tensor": (lambda model: drop_tensor(model, "model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj"),
    "empty generation settings": (lambda model: (model / "generation_config.json").write_text(""), "generation_config"),
    "generation settings that are a list": (
        lambda model: (model / "generation_config.json").write_text("[1]"),
        "generation_config",
    ),
    "a truncated tokenizer": (
        lambda model: (model / "tokenizer.json").write_text((model / "tokenizer.json").read_text()[:100]),
        "tokenizer.json",
    ),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), "tokenizer"),
    "malformed held-out text": (
        lambda model: (model.parent / "heldout.jsonl").write_text('{"domain": "d", "text": 1}\n'),
        "heldout.jsonl",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_it_is_known_before_the_first_block(
    what: str, model: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks, named = BROKEN[what]
    breaks(model)
    monkeypatch.setattr(loop, "write_block", None)
    out = tmp_path / "out"
    found = CliRunner().invoke(cli.app, ["run", str(recipe), "--device", "cpu", "--out", str(out), "--quiet"])
    assert isinstance(found.exception, QuantlabError), found.exception
    assert named in str(found.exception)
    assert found.exception.where
    assert found.exception.found
    assert found.exception.fix
    assert not (out / "artifacts").exists()


def test_a_peer_with_another_tokenizer_is_known_before_the_first_block(recipe: Path, tmp_path: Path) -> None:
    peer = shutil.copytree(tmp_path / "model", tmp_path / "peer")
    recipe.write_text(recipe.read_text() + "peers: {other: peer}\n")
    loaded = load_recipe(recipe)

    def check() -> None:
        plan = compile_plan(
            loaded.recipe, open_checkpoint(tmp_path / "model"), peers={"other": open_checkpoint(tmp_path / "peer")}
        )
        run = tmp_path / "out"
        check_before_running(loaded, plan, run, Commits(run), progress=lambda *_: None, time_limit=100)

    check()
    tokenizer = json.loads((peer / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["w1"], words["w2"] = words["w2"], words["w1"]
    (peer / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(EvaluationError, match="as different tokens"):
        check()
    (peer / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        check()


def test_a_weight_beyond_float16_is_known_before_calibration(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, name = model / "model.safetensors", "model.layers.2.mlp.down_proj.weight"
    tensors = load_file(path)
    tensors[name][3, 5] = 1e5
    save_file(tensors, path, metadata={"format": "pt"})
    monkeypatch.setattr(loop, "write_block", None)
    variants = GPTQ + "  half: [{cast: float16}, {quantize: int4_g128, algorithm: {name: gptq}}]\n"
    with pytest.raises(CheckpointError, match="too large for float16") as caught:
        run(write_recipe(tmp_path, model, variants), tmp_path / "out")
    assert name in str(caught.value)
    assert "bfloat16" in str(caught.value)
    assert not (tmp_path / "out/artifacts").exists()


def test_integers_that_expand_beyond_float16_are_refused(model: Path, tmp_path: Path) -> None:
    path, name = model / "model.safetensors", "model.layers.2.mlp.down_proj.weight"
    tensors = load_file(path)
    tensors[name][3, 5] = 1e5  # its scale, 1e5 / 7.5, fits
    save_file(tensors, path, metadata={"format": "pt"})
    variants = "  half: [{cast: float16}, {quantize: int4_g128, algorithm: {name: rtn, clip: none}}]\n"
    with pytest.raises(CheckpointError, match="overflows") as caught:
        run(write_recipe(tmp_path, model, variants), tmp_path / "out")
    assert name in str(caught.value)


@pytest.mark.slow
def test_verify_expands_in_the_stored_dtype(model: Path, tmp_path: Path) -> None:
    variants = "  half: [{cast: float16}, {quantize: int4_g128}]\n"
    artifact = run(write_recipe(tmp_path, model, variants), tmp_path / "out").artifact("half")
    shard = next(
        path
        for path in artifact.glob("*.safetensors")
        if any(".2." in name and "scale" in name for name in load_file(path))
    )
    tensors = load_file(shard)
    name = next(name for name in tensors if ".2." in name and "scale" in name)
    tensors[name][0, 0] = 6e4
    save_file(tensors, shard, metadata={"format": "pt"})
    check = _check_finite(StoredWeights(Reader(open_checkpoint(artifact))))
    assert check.verdict == "failed"
    assert "model.layers.2." in check.detail


def test_no_quality_is_exit_code_1_and_said_under_quiet(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fails(Worker):
        def run(self, name: str, *_: object, **__: object) -> object:  # type: ignore[override]
            raise CellError(f"{name} found no room")

    monkeypatch.setattr("quantlab.evaluation.processes.workers.Worker", Fails)
    for verb in ("run", "eval"):
        arguments = [verb, str(recipe), "--device", "cpu", "--out", str(tmp_path / "out"), "--quiet"]
        found = CliRunner().invoke(cli.app, arguments)
        assert found.exit_code == 1
        assert "v: quality: v-quality found no room" in found.stderr
        assert found.stdout == ""


def test_two_evaluations_of_one_directory_exclude_each_other(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    held, done = threading.Event(), threading.Event()

    def other() -> None:
        with RunDirectory(out).locked():
            held.set()
            done.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        assert held.wait(60)
        found = CliRunner().invoke(cli.app, ["eval", str(recipe), "--device", "cpu", "--out", str(out)])
        assert isinstance(found.exception, ArtifactError)
        assert "another run" in str(found.exception)
    finally:
        done.set()
        thread.join()


TASK = """\
task: colours
dataset_path: json
dataset_kwargs: {data_files: ITEMS}
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Callable[[str], Path]:
    """Write a suite with one task of lm-eval; `colours` is right, and the items of `lost` are missing."""
    (tmp_path / "tasks").mkdir()
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps({"question": f"{n}?", "choices": ["red", "blue"]}) + "\n" for n in range(3)))
    (tmp_path / "tasks/colours.yaml").write_text(TASK.replace("ITEMS", str(items)))
    lost = TASK.replace("ITEMS", str(tmp_path / "none.jsonl")).replace("colours", "lost")
    (tmp_path / "tasks/lost.yaml").write_text(lost)

    def suite(task: str) -> Path:
        path = tmp_path / "suite.yaml"
        path.write_text(SUITE + f"tasks: [{{definitions: tasks, {task}}}]\n")
        return path

    return suite


@pytest.mark.slow
def test_a_task_of_lm_eval_is_tried(recipe: Path, tasks: Callable[[str], Path]) -> None:
    def tried(task: str) -> int:
        return try_tasks(TrialRequest(suite=tasks(task)), lambda *_: None).tried

    assert tried("task: colours, metric: acc, seeds: [0, 1]") == 1
    for task, named in (("task: colours, metric: acc_nrom", "acc"), ("task: colors", "colors"), ("task: lost", "lost")):
        with pytest.raises(EvaluationError, match=named) as caught:
            tried(task)
        assert caught.value.fix


@pytest.mark.slow
def test_a_task_of_lm_eval_is_known_before_the_first_block(
    recipe: Path, tasks: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks("task: colors")
    monkeypatch.setattr(loop, "write_block", None)
    out = tmp_path / "out"
    found = CliRunner().invoke(cli.app, ["run", str(recipe), "--device", "cpu", "--out", str(out), "--quiet"])
    assert isinstance(found.exception, EvaluationError), found.exception
    assert "colors" in str(found.exception)
    assert "suite.yaml" in str(found.exception)
    assert not (out / "artifacts").exists()
