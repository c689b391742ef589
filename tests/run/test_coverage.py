"""Coverage of experts: the routing that is counted, and samples added until every expert has enough."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from quantlab.calibration.coverage import tokens_per_expert
from quantlab.calibration.drawn import DrawnText
from quantlab.calibration.hidden import Workspace
from quantlab.calibration.layer import Skeleton
from quantlab.checkpoint.index import open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.cli import app
from quantlab.errors import PlanError, RecipeError
from quantlab.recipe.schema import Calibration
from quantlab.run.coverage import Covering
from tests.checkpoints import make_checkpoint
from tests.evaluation.conftest import write_corpus, write_tokenizer


def test_the_routing_is_that_of_the_whole_model(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = open_checkpoint(checkpoints["deepseek_v2"])
    reader = Reader(source)
    tokens = torch.randint(0, 384, (5, 12), generator=torch.Generator().manual_seed(0))
    skeleton = Skeleton(source.config, dtype=torch.float32, device=torch.device("cpu"))
    hidden = Workspace(tmp_path, memory_bytes=1 << 30, device=torch.device("cpu"), tokens_at_once=24).stream(
        5, 12, skeleton.width, dtype=torch.float32
    )
    found = tokens_per_expert(skeleton, tokens, lambda name: reader.read(name), hidden)
    model = AutoModelForCausalLM.from_pretrained(checkpoints["deepseek_v2"], dtype=torch.float32)
    expected = {f"layer {index}": torch.zeros(8, dtype=torch.int64) for index in (1, 2)}
    for index in (1, 2):
        counts = expected[f"layer {index}"]

        def hook(_: object, arguments: tuple[Tensor, ...], counts: Tensor = counts) -> None:
            counts += torch.bincount(arguments[1].flatten(), minlength=8)

        model.model.layers[index].mlp.experts.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(tokens)
    assert {block: one.tolist() for block, one in found.items()} == {
        block: one.tolist() for block, one in expected.items()
    }
    assert all(int(one.sum()) == 5 * 12 * 2 for one in found.values())


class _Routed(Covering):
    """Counts tokens in place of routing: token n goes to expert n."""

    def _route(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"layer 1": torch.bincount(tokens.flatten(), minlength=4)}

    def _key(self, first: DrawnText) -> str:
        return "key"


class _Text:
    """A text of two sources whose samples [1] have the tokens of a list."""

    def __init__(self, first: list[int], second: list[int]) -> None:
        self.tokens = torch.tensor([*first, *second])[:, None]
        self.samples = (len(first), len(second))


def covering(run: Path, coverage: int) -> _Routed:
    calibration = Calibration(dataset="d", samples=2, length=1, coverage=coverage)
    return _Routed(None, calibration, torch.device("cpu"), lambda _: torch.empty(0), run, run)  # type: ignore[arg-type]


FIRST, SECOND = [0, 1, 2, 3] * 4, [0, 0, 0, 0, 0, 3, 3, 3]


@pytest.mark.parametrize(
    ("wanted", "samples", "ended", "uncovered"),
    [
        (1, 8, "covered", {}),  # the first sources' four samples have every expert once
        (2, 16, "covered", {}),
        (3, 16, "the limit", {"layer 1": {"1": 2, "2": 2}}),
    ],
)
def test_samples_are_added_until_every_expert_has_enough(
    tmp_path: Path, wanted: int, samples: int, ended: str, uncovered: dict[str, dict[str, int]]
) -> None:
    asked: list[int] = []

    def draw(count: int) -> _Text:
        asked.append(count)
        return _Text(FIRST[: count // 2], SECOND[: count // 2])

    text, found = covering(tmp_path, wanted).cover(draw(2), draw)  # type: ignore[arg-type]
    assert (found.samples, found.ended, found.uncovered) == (samples, ended, uncovered)
    assert len(text.tokens) == samples
    asked.clear()
    again, known = covering(tmp_path, wanted).cover(draw(2), draw)  # type: ignore[arg-type]
    assert asked == [2, samples]  # nothing is routed again
    assert known == found
    assert torch.equal(again.tokens, text.tokens)


def test_a_text_that_ends(tmp_path: Path) -> None:
    def draw(count: int) -> _Text:
        return _Text(FIRST[: min(count // 2, 3)], SECOND[: min(count // 2, 3)])

    _, found = covering(tmp_path, 1).cover(draw(2), draw)  # type: ignore[arg-type]
    assert (found.ended, found.uncovered) == ("the text ended", {"layer 1": {"3": 0}})


RECIPE = """
model: model
calibration: {{dataset: calibration.jsonl, samples: 4, length: 16, coverage: {coverage}}}
variants:
  a: [{{quantize: int4_g32, algorithm: {{name: gptq}}}}]
  b: [{{quantize: int4_g64, algorithm: {{name: gptq}}}}]
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_tokenizer(make_checkpoint(tmp_path / "model", "deepseek_v2"))
    write_corpus(tmp_path / "calibration.jsonl", documents=60)
    return tmp_path


def run(files: Path, coverage: int) -> None:
    (files / "recipe.yaml").write_text(RECIPE.format(coverage=coverage))
    arguments = ["run", str(files / "recipe.yaml"), "--out", str(files / "out"), "--device", "cpu"]
    CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.slow
def test_a_run_reports_its_coverage(files: Path) -> None:
    run(files, 6)
    manifest = json.loads((files / "out" / "artifacts" / "b" / "manifest.json").read_text())
    calibration = manifest["calibration"]
    covered = calibration["covered"]
    assert covered["wanted"] == calibration["coverage"] == 6
    assert covered["samples"] > calibration["samples"] == 4
    assert calibration["sources"][0]["samples"] == covered["samples"]
    assert (covered["ended"], covered["uncovered"]) == ("covered", {})
    card = (files / "out" / "artifacts" / "a" / "README.md").read_text()
    assert f"{covered['samples']} samples of 16 tokens" in card
    assert "every routed expert has them" in card


def test_coverage_that_cannot_be(files: Path) -> None:
    write_tokenizer(make_checkpoint(files / "dense", "llama"))
    text = RECIPE.format(coverage=1)
    (files / "recipe.yaml").write_text(text.replace("model: model", "model: dense"))
    with pytest.raises(PlanError, match="no routed experts to cover"):
        CliRunner().invoke(app, ["plan", str(files / "recipe.yaml")], catch_exceptions=False)
    (files / "recipe.yaml").write_text(text.replace("dataset:", "corpus:"))
    with pytest.raises(RecipeError, match="`coverage` adds samples of datasets"):
        CliRunner().invoke(app, ["plan", str(files / "recipe.yaml")], catch_exceptions=False)
