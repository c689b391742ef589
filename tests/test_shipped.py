"""What comes with quantlab is known by name, in a checkout and in a wheel that knows no checkout."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from quantlab.checkpoint.index import open_checkpoint
from quantlab.errors import RecipeError
from quantlab.evaluation.engines.judged import find_source
from quantlab.evaluation.suite import load_suite
from quantlab.recipe.load import load_recipe
from quantlab.shipped import Kind, description, locate, names

ROOT = Path(__file__).parent.parent


def _recipe(directory: Path, **words: str) -> Path:
    words = {"model": "deepseek-v3-mini", "corpus": "builtin", "suite": "quick", "claims": "guide"} | words
    path = directory / "mine.yaml"
    path.write_text(
        f"model: {words['model']}\ncalibration: {{corpus: {words['corpus']}, samples: 4, length: 64}}\n"
        "variants:\n  w4a16: [{quantize: int4_g64, algorithm: {name: gptq}}]\n"
        f"evaluate: {{suite: {words['suite']}, claims: {words['claims']}}}\n"
    )
    return path


def test_names_stand_for_the_files_of_the_repository(tmp_path: Path) -> None:
    loaded = load_recipe(_recipe(tmp_path))
    assert loaded.model == ROOT / "eval" / "reference" / "deepseek-v3-mini"
    assert loaded.corpus == ROOT / "eval" / "corpora" / "calibration.jsonl"
    assert loaded.suite == ROOT / "eval" / "suites" / "quick.yaml"
    assert loaded.claims == ROOT / "eval" / "claims" / "guide.yaml"
    assert load_recipe(Path("quickstart")).path == ROOT / "recipes" / "quickstart.yaml"


def test_a_path_comes_before_a_name(tmp_path: Path) -> None:
    (tmp_path / "builtin").write_text('{"text": "mine"}')
    (tmp_path / "deepseek-v3-mini").mkdir()
    loaded = load_recipe(_recipe(tmp_path))
    assert loaded.corpus == tmp_path / "builtin"
    assert loaded.model == tmp_path / "deepseek-v3-mini"


@pytest.mark.parametrize(
    ("kind", "word", "nearest"),
    [
        ("recipe", "quikstart", "quickstart"),
        ("suite", "qick", "quick"),
        ("corpus", "builtn", "builtin"),
        ("claims", "guid", "guide"),
        ("model", "deepseek-v3-min", "deepseek-v3-mini"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path, kind: Kind, word: str, nearest: str) -> None:
    with pytest.raises(RecipeError, match=f"did you mean `{nearest}`"):
        locate(word, kind, beside=tmp_path, where="here")
    with pytest.raises(RecipeError, match=f"use one of: .*{nearest}.*; else give"):
        locate("-", kind, beside=tmp_path, where="here")


def test_an_unknown_word_of_a_recipe_is_told_with_its_file(tmp_path: Path) -> None:
    loaded = load_recipe(_recipe(tmp_path, suite="qick"))
    with pytest.raises(RecipeError, match=r"where: .*mine\.yaml"):
        _ = loaded.suite


def test_a_suite_may_name_a_corpus(tmp_path: Path) -> None:
    suite = tmp_path / "mine.yaml"
    suite.write_text("name: mine\nversion: 1\ntext: {corpus: heldout, length: 64, tokens_per_domain: 64}\n")
    assert load_suite(suite).corpus == ROOT / "eval" / "corpora" / "heldout.jsonl"


@pytest.mark.parametrize("kind", ["recipe", "suite", "corpus", "claims", "model"])
def test_everything_has_a_description_of_one_line(kind: Kind) -> None:
    described = {name: description(path, kind) for name, path in names(kind).items()}
    assert described
    assert all(10 < len(text) < 200 and "\n" not in text for text in described.values()), described


@pytest.mark.slow
def test_a_wheel_runs_by_name_from_an_empty_folder(tmp_path: Path) -> None:
    """The wheel alone, with the libraries of this environment but not its `.pth` files, which name the checkout."""
    wheels, target, empty = (tmp_path / name for name in ("wheels", "target", "empty"))
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", str(ROOT), "--wheel-dir", str(wheels)], check=True)
    (wheel,) = wheels.glob("*.whl")
    assert wheel.stat().st_size < 60e6
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    paths = os.pathsep.join([str(target), sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]])

    def quantlab(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", "-m", "quantlab", *arguments],
            env={**os.environ, "PYTHONPATH": paths},
            cwd=empty,
            capture_output=True,
            text=True,
            check=True,
        )

    listed = json.loads(quantlab("recipes", "--json").stdout)
    assert {name: sorted(found) for name, found in listed.items()} == {name: sorted(names(name)) for name in listed}  # type: ignore[arg-type]
    assert all(Path(one["path"]).is_relative_to(target) for found in listed.values() for one in found.values())
    assert "w4a16-experts" in quantlab("plan", "quickstart").stdout
    (empty / "mine.yaml").write_text(
        "model: deepseek-v3-mini\ncalibration: {corpus: builtin, samples: 4, length: 64}\n"
        "variants:\n  w4a16: [{quantize: int4_g64, targets: [attention], algorithm: {name: gptq}}]\n"
    )
    quantlab("run", "mine.yaml", "--device", "cpu", "--quiet")
    assert (empty / "runs" / "mine" / "artifacts" / "w4a16" / "manifest.json").is_file()


def test_the_source_of_an_artifact_is_found_by_its_name(tmp_path: Path) -> None:
    model = names("model")["deepseek-v3-mini"]
    artifact = tmp_path / "run" / "artifacts" / "w4a16"
    artifact.mkdir(parents=True)
    source = {"model": "deepseek-v3-mini", "fingerprint": open_checkpoint(model).fingerprint()}
    (artifact / "manifest.json").write_text(json.dumps({"source": source}))
    assert find_source(artifact) == model
