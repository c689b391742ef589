"""Rules for the repository: every shipped file loads, files and functions stay short, imports have no side effects."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantlab.checkpoint.index import open_checkpoint
from quantlab.evaluation.suite import load_suite
from quantlab.formats.layouts import description_of
from quantlab.plan.compile import compile_plan
from quantlab.recipe.load import load_recipe
from quantlab.recipe.presets import PRESETS
from quantlab.report.claims.check import load_claims

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "quantlab").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SUITES = sorted((ROOT / "eval" / "suites").rglob("*.yaml"))


def test_there_is_something_to_try() -> None:
    """If a listing were empty, the tests below would pass without testing anything."""
    assert len(RECIPES) >= 1
    assert len(SUITES) >= 1
    assert len(MODULES) >= 60


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_finds_what_it_names(path: Path) -> None:
    loaded = load_recipe(path)
    if loaded.hub_id is None:  # recipes of hub models are planned from headers in tests/plan
        plan = compile_plan(loaded.recipe, open_checkpoint(loaded.model))
        assert [variant.name for variant in plan.variants] == list(loaded.recipe.variants)
    if loaded.recipe.calibration is not None:
        corpus, sources = loaded.recipe.calibration.corpus, loaded.recipe.calibration.sources
        assert corpus is None or loaded.resolve(corpus, "corpus").is_file()
        assert all(source.dataset in PRESETS for source in sources)  # pinned to commits
    if loaded.suite is not None:
        load_suite(loaded.suite)
    if loaded.claims is not None:
        load_claims(loaded.claims)


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_every_suite_loads(path: Path) -> None:
    assert load_suite(path).suite.name == path.stem


@pytest.mark.parametrize("name", ["calibration", "heldout"])
def test_every_corpus_is_json_lines_with_a_licence_note(name: str) -> None:
    lines = (ROOT / "eval" / "corpora" / f"{name}.jsonl").read_text().splitlines()
    documents = [json.loads(line) for line in lines]
    assert all({"id", "domain", "source", "text"} <= set(document) for document in documents)
    assert len({document["id"] for document in documents}) == len(documents)
    assert (ROOT / "eval" / "corpora" / "README.md").is_file()


def test_heldout_text_was_not_trained_on() -> None:
    """No paragraph of the held-out text occurs in the calibration text, which is part of the training text."""
    paragraphs = []
    for name in ("calibration", "heldout"):
        texts = [
            json.loads(line)["text"] for line in (ROOT / "eval" / "corpora" / f"{name}.jsonl").read_text().splitlines()
        ]
        paragraphs.append(
            {" ".join(part.split()) for text in texts for part in text.split("\n\n") if len(part.split()) >= 12}
        )
    assert len(paragraphs[1]) > 100
    assert not paragraphs[0] & paragraphs[1]


def test_the_reference_checkpoint_is_what_the_readme_says() -> None:
    directory = ROOT / "eval" / "reference" / "deepseek-v3-mini"
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 48e6
    checkpoint = open_checkpoint(directory)
    assert checkpoint.config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert checkpoint.config["topk_method"] == "noaux_tc"
    assert str(description_of(checkpoint)) == "FP8 in blocks of 128x128"
    assert len(checkpoint.files) >= 4
    parted = [
        name
        for name, entry in checkpoint.tensors.items()
        if name.endswith("_scale_inv") and entry.file != checkpoint.tensors[name.removesuffix("_scale_inv")].file
    ]
    assert parted
    assert any(name.startswith("model.layers.8.eh_proj") for name in checkpoint.tensors)


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def test_files_and_functions_stay_short() -> None:
    too_long = [str(path) for path in MODULES if len(path.read_text().splitlines()) > 400]
    too_long += [name for name, node in functions() if (node.end_lineno or 0) - node.lineno >= 60]
    assert not too_long


def test_packages_export_nothing() -> None:
    """An `__init__.py` contains at most a docstring."""
    for path in MODULES:
        if path.name == "__init__.py":
            body = ast.parse(path.read_text()).body
            assert not body or (len(body) == 1 and ast.get_docstring(ast.Module(body, [])) is not None), path


def test_no_module_is_a_drawer() -> None:
    assert not {"utils", "helpers", "common", "misc", "base"} & {path.stem for path in MODULES}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "quantlab" / "algorithms").glob("[!_]*.py")), ids=lambda path: path.stem
)
def test_an_algorithm_is_pure_and_names_its_paper(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert re.search(r"arXiv \d{4}\.\d{5}", ast.get_docstring(tree) or "")
    allowed = (
        "torch",
        "math",
        "typing",
        "dataclasses",
        "collections",
        "quantlab.numerics",
        "quantlab.algorithms",
        "quantlab.errors",
    )
    for node in ast.walk(tree):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        assert all(name.startswith(allowed) for name in names)


@pytest.mark.slow
def test_importing_everything_changes_nothing() -> None:
    """Import every module in a fresh process: no changes of environment, threads or files."""
    names = [
        str(path.relative_to(ROOT).with_suffix("")).replace(os.sep, ".").removesuffix(".__init__")
        for path in MODULES
        if path.name != "__main__.py"
    ]
    code = (
        "import os, torch, transformers.masking_utils\n"
        "before = (dict(os.environ), torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed())\n"
        f"for name in {names!r}:\n"
        "    try: __import__(name)\n"
        "    except ModuleNotFoundError as error:\n"
        "        if error.name != 'triton': raise  # it comes with torch for CUDA, and nothing else imports these\n"
        "assert before == (dict(os.environ), torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed())"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    command = re.search(r"^\.venv/bin/python -m pytest.*$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    assert command
    assert f"&& {command[0]}\n" in readme


@pytest.mark.slow
def test_help_names_every_verb() -> None:
    done = subprocess.run([sys.executable, "-m", "quantlab", "--help"], capture_output=True, text=True, check=True)
    for verb in (
        "plan",
        "run",
        "eval",
        "report",
        "compare",
        "leaderboard",
        "inspect",
        "verify",
        "recipes",
        "doctor",
        "push",
    ):
        assert re.search(rf"^\W*{verb} ", done.stdout, flags=re.MULTILINE)
