"""Artifacts are made again if and only if something they depend on has changed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quantlab.run.calibrated  # noqa: F401 - so that the trace of executed code contains no imports
from quantlab.checkpoint.index import open_checkpoint
from quantlab.errors import ArtifactError
from quantlab.fingerprint import modules_reached
from quantlab.plan.compile import compile_plan
from quantlab.plan.model import VariantPlan
from quantlab.recipe.load import load_recipe
from quantlab.run.directory import RunDirectory
from quantlab.run.execute import make_artifacts
from quantlab.run.identity import Computing, Identity, identify, is_current
from tests.checkpoints import make_checkpoint
from tests.run.test_calibrated import ALGORITHMS, with_tokenizer, write_recipe

ROOT = Path(__file__).parents[2]
VARIANTS = """\
  gptq: [{quantize: int4_g128, targets: [dense_mlp], algorithm: {name: gptq}}]
  rtn: [{quantize: int4_g128, targets: [dense_mlp]}]
  wanda: [{prune: 0.3, targets: [dense_mlp], algorithm: {name: wanda}}]
"""
CPU = torch.device("cpu")


def variants_of(recipe: Path) -> dict[str, VariantPlan]:
    loaded = load_recipe(recipe)
    source = open_checkpoint(loaded.model)
    plan = compile_plan(loaded.recipe, source, corpus_sha256=loaded.corpus_sha256())
    return {variant.name: variant for variant in plan.variants}


@pytest.mark.slow
def test_code_remakes_what_it_makes_and_wording_nothing(tmp_path: Path) -> None:
    """Changing one line of GPTQ remakes only GPTQ's variants; changing a docstring or moving files remakes nothing."""
    shutil.copytree(ROOT / "quantlab", tmp_path / "code" / "quantlab", ignore=shutil.ignore_patterns("__pycache__"))
    model = with_tokenizer(make_checkpoint(tmp_path / "model", "llama"))
    recipe = write_recipe(tmp_path, model, VARIANTS)

    def run(out: Path) -> dict[str, int]:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "code"), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [
            sys.executable,
            "-m",
            "quantlab",
            "run",
            str(recipe),
            "--out",
            str(out),
            "--quiet",
            "--device",
            "cpu",
        ]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path)
        return {
            name: (out / "artifacts" / name / "manifest.json").stat().st_mtime_ns for name in ("gptq", "rtn", "wanda")
        }

    made = run(tmp_path / "out")
    gptq = tmp_path / "code" / "quantlab" / "algorithms" / "gptq.py"
    text = gptq.read_text()
    gptq.write_text(text.replace('"""', '"""Another docstring. ', 1) + "\n# a comment\n")
    assert run(tmp_path / "out") == made
    shutil.move(tmp_path / "out", tmp_path / "moved")
    shutil.move(model, tmp_path / "model-moved")
    recipe.write_text(recipe.read_text().replace(str(model), str(tmp_path / "model-moved")))
    assert run(tmp_path / "moved") == made
    gptq.write_text(text + "\n_ADDED = 1\n")
    again = run(tmp_path / "moved")
    assert {name for name in made if made[name] != again[name]} == {"gptq"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
def test_every_algorithm_that_runs_is_in_the_fingerprint(family: str, tmp_path: Path) -> None:
    """All code of quantlab/algorithms that runs while a variant is made is part of its fingerprint."""
    model = with_tokenizer(make_checkpoint(tmp_path / "model", family))
    more = "  reap: [{prune: 0.25, algorithm: {name: reap}}]\n" if family == "deepseek_v2" else ""
    lines = [
        *ALGORITHMS.splitlines(),
        *"  plain: [{quantize: int8}]\n  magnitude: [{prune: 0.1}]\n".splitlines(),
        *more.splitlines(),
    ]
    for line in lines:
        name = line.split(":")[0].strip()
        folder = tmp_path / name
        folder.mkdir()
        recipe = write_recipe(folder, model, line + "\n")
        executed: set[str] = set()

        def trace(frame, event, _, executed=executed):
            executed.add(frame.f_code.co_filename)

        loaded = load_recipe(recipe)
        plan = compile_plan(loaded.recipe, open_checkpoint(model), corpus_sha256=loaded.corpus_sha256())
        sys.setprofile(trace)
        try:
            make_artifacts(plan, loaded, RunDirectory(folder / "out"), lambda _: lambda _: None)
        finally:
            sys.setprofile(None)
        below = ROOT / "quantlab" / "algorithms"
        ran = {f"quantlab.algorithms.{Path(path).stem}" for path in executed if Path(path).is_relative_to(below)}
        roots = [f"quantlab.algorithms.{algorithm}" for algorithm in plan.variants[0].algorithms]
        assert ran, name
        assert ran <= modules_reached(roots), name


def test_a_recipe_on_another_device_is_another_artifact(tmp_path: Path) -> None:
    model = with_tokenizer(make_checkpoint(tmp_path / "model", "llama"))
    variants = variants_of(write_recipe(tmp_path, model, VARIANTS))
    here = identify(variants["gptq"], CPU)
    assert here.calibration == Computing("cpu", "", "float32")
    assert identify(variants["rtn"], CPU).calibration is None, "what is not calibrated depends on no device"
    there = Identity(here.recipe, here.code, here.versions, Computing("cuda", "NVIDIA H200", "bfloat16"))
    assert there.key != here.key
    assert here.difference(there.written()) == "calibration"
    assert "NVIDIA H200 in bfloat16, this run would calibrate on cpu in float32" in here.explain(there.written())
    assert is_current(variants["gptq"], here.written())
    other_code = Identity(here.recipe, "0" * 64, here.versions, here.calibration)
    assert here.difference(other_code.written()) == "code"
    assert not is_current(variants["gptq"], other_code.written())
    other_versions = Identity(here.recipe, here.code, {"torch": "2.0"}, here.calibration)
    assert here.difference(other_versions.written()) == "code"
    other_recipe = Identity("0" * 64, here.code, here.versions, here.calibration)
    assert here.difference(other_recipe.written()) == "recipe"
    renamed = here.written()
    renamed["calibration"]["cpu"] = "another processor"
    assert here.difference(renamed) == "none"


@pytest.mark.slow
def test_a_recipe_says_the_dtype_of_its_calibration(tmp_path: Path) -> None:
    model = with_tokenizer(make_checkpoint(tmp_path / "model", "llama"))
    recipe = write_recipe(tmp_path, model, VARIANTS, calibration=", dtype: bfloat16")
    assert identify(variants_of(recipe)["gptq"], CPU).calibration == Computing("cpu", "", "bfloat16")
    loaded = load_recipe(recipe)
    plan = compile_plan(loaded.recipe, open_checkpoint(model), corpus_sha256=loaded.corpus_sha256())
    make_artifacts(plan, loaded, RunDirectory(tmp_path / "out"), lambda _: lambda _: None)
    manifest = json.loads((tmp_path / "out" / "artifacts" / "gptq" / "manifest.json").read_text())
    assert manifest["identity"]["calibration"] | {"cpu": ""} == {
        "device": "cpu",
        "gpu": "",
        "dtype": "bfloat16",
        "cpu": "",
    }
    assert manifest["identity"]["calibration"]["cpu"]
    assert manifest["key"] == manifest["identity"]["key"]
    card = (tmp_path / "out" / "artifacts" / "gptq" / "README.md").read_text()
    assert f"Computed on {manifest['identity']['calibration']['cpu']}, in bfloat16." in card


def test_an_artifact_of_another_device_is_not_replaced_unasked(tmp_path: Path) -> None:
    model = with_tokenizer(make_checkpoint(tmp_path / "model", "llama"))
    recipe = write_recipe(tmp_path, model, VARIANTS)
    loaded = load_recipe(recipe)
    plan = compile_plan(loaded.recipe, open_checkpoint(model), corpus_sha256=loaded.corpus_sha256())
    directory = RunDirectory(tmp_path / "out")
    make_artifacts(plan, loaded, directory, lambda _: lambda _: None)
    variant = next(variant for variant in plan.variants if variant.name == "gptq")
    here = identify(variant, CPU)
    there = Identity(here.recipe, here.code, here.versions, Computing("cuda", "NVIDIA H200", "bfloat16"))
    assert directory.state("gptq", here) == "complete"
    with pytest.raises(ArtifactError, match="an artifact of another calibration"):
        directory.state("gptq", there)
    assert directory.state("gptq", there, overwrite=True) == "outdated"
    assert directory.check_measurable(variant), "it is measured wherever it was made"
    other = Identity(here.recipe, "0" * 64, here.versions, here.calibration)
    assert directory.state("gptq", other) == "outdated"
