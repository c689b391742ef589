"""Exports of a recipe: written after the artifacts, kept while they are current, remade otherwise; and `quantlab export`."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantlab.checkpoint.index import open_checkpoint
from quantlab.cli import app
from quantlab.errors import ArtifactError
from quantlab.plan.compile import compile_plan
from quantlab.recipe.load import load_recipe
from quantlab.run.directory import RunDirectory
from quantlab.run.execute import make_artifacts
from quantlab.run.exports import Export, write_exports

RECIPE = """\
model: {model}
variants:
  w4a16: {{passes: [{{quantize: int4_g128}}], format: [gptq, dense]}}
  fp16: [{{cast: float16}}]
"""


@pytest.fixture
def directory(checkpoints: dict[str, Path], tmp_path: Path) -> RunDirectory:
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=checkpoints["llama"]))
    return RunDirectory(tmp_path / "out")


def run(directory: RunDirectory) -> list[Export]:
    loaded = load_recipe(directory.path.parent / "recipe.yaml")
    plan = compile_plan(loaded.recipe, open_checkpoint(loaded.model))
    make_artifacts(plan, loaded, directory, lambda _: lambda _: None)
    return write_exports(plan, directory, lambda _, __: lambda _: None)


def test_exports_are_kept_while_they_are_current(directory: RunDirectory) -> None:
    first = run(directory)
    assert [one.directory.name for one in first] == ["w4a16.gptq", "w4a16.dense"]
    assert all(one.made for one in first)
    assert sorted(path.name for path in directory.path.iterdir()) == [".recipe.yaml", "artifacts", "exports"]
    assert not any(one.made for one in run(directory))
    gptq = first[0].directory
    content = json.loads((gptq / "export.json").read_text())
    (gptq / "export.json").write_text(json.dumps(content | {"artifact_key": "of another artifact"}))
    assert [one.made for one in run(directory)] == [True, False]
    assert json.loads((gptq / "export.json").read_text()) == content
    (first[1].directory / "config.json").unlink()
    assert [one.made for one in run(directory)] == [False, True]


def test_something_else_at_the_path_of_an_export_is_not_replaced(directory: RunDirectory) -> None:
    (directory.path / "exports" / "w4a16.gptq").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="the directory of the export exists"):
        run(directory)


def test_the_command_line_writes_one_export(directory: RunDirectory) -> None:
    run(directory)
    artifact = directory.artifact("fp16")
    runner = CliRunner()
    result = runner.invoke(app, ["export", str(artifact), "--format", "dense", "--json"])
    assert result.exit_code == 0, result.output
    written = directory.path / "exports" / "fp16.dense"
    assert json.loads(result.output) == {"export": str(written), "notes": []}
    assert (written / "export.json").is_file()
    for arguments, what in (
        ([str(artifact), "--format", "dense"], "the directory of the export exists"),
        ([str(artifact), "--format", "gptq"], "the format gptq cannot express this artifact"),
        ([str(artifact), "--format", "gtpq"], "unknown format"),
        ([str(directory.path), "--format", "dense", "--out", str(directory.path / "x")], "is not a quantlab artifact"),
        ([str(directory.path), "--format", "dense"], "the artifact is outside the directory of a run"),
    ):
        failed = runner.invoke(app, ["export", *arguments, "--quiet"])
        assert isinstance(failed.exception, ArtifactError), failed.output
        assert what in failed.exception.what
        assert failed.exception.fix


def test_a_missing_package_is_named_before_the_work(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPE.format(model=checkpoints["llama"]).replace("[gptq, dense]", "gguf").replace("g128", "g32")
    (tmp_path / "recipe.yaml").write_text(recipe)
    monkeypatch.setattr("quantlab.preflight.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, ArtifactError)
    assert result.exception.fix == "pip install 'quantlab[gguf]'"
    assert not (tmp_path / "out").exists()
