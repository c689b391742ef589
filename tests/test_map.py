"""The map of the package matches the code: its files exist, its layers are the linter's, its names are defined."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "quantlab" / "README.md").read_text()
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


def test_every_file_it_names_exists() -> None:
    named = set(re.findall(r"(?<![\w/.])((?:[\w-]+/)+(?:[\w*-]+\.(?:py|yaml|md))?)", TEXT))
    named |= set(re.findall(r"`([\w-]+\.py)`", TEXT))
    paths = {name for name in named if not name.startswith(("artifacts/", "records/"))}
    assert len(paths) >= 40
    missing = []
    for name in paths:
        places = [ROOT / name] if name.startswith(("tests/", "recipes/", "eval/")) else [ROOT / "quantlab" / name]
        if "/" not in name:
            places += list((ROOT / "quantlab").rglob(name))
        found = [path for place in places for path in place.parent.glob(place.name)] if "*" in name else places
        if not any(path.exists() for path in found) and not list((ROOT / "quantlab").glob(name)):
            missing.append(name)
    assert not missing


def test_every_folder_has_its_row() -> None:
    rows = set(re.findall(r"^\| `([\w]+)/` \|", TEXT, flags=re.MULTILINE))
    assert rows == {path.parent.name for path in (ROOT / "quantlab").glob("*/__init__.py")}


def test_its_layers_are_those_of_the_linter() -> None:
    block = re.search(r"## The layers\n.*?```\n(.*?)```", TEXT, flags=re.DOTALL)
    assert block is not None
    (layers,) = (contract["layers"] for contract in CONTRACTS if contract["type"] == "layers")
    assert block[1].splitlines() == [layer.replace("quantlab.", "") for layer in layers]


def test_its_walls_are_the_contracts_of_the_linter() -> None:
    walls = re.search(r"each a contract of the import linter:\n\n(.*?)\n\n", TEXT, flags=re.DOTALL)
    assert walls is not None
    listed = [line.removeprefix("- ") for line in walls[1].splitlines()]
    assert listed == [contract["name"] for contract in CONTRACTS if contract["type"] == "forbidden"]


def test_names_of_a_step_are_in_the_files_it_names() -> None:
    """Every name in backticks of a step of a walk occurs in a file that the same step names."""
    walks = TEXT.split("## Seven walks")[1]
    steps = re.findall(r"^\d\. (.*?)(?=^\d\. |^###|\Z)", walks, flags=re.MULTILINE | re.DOTALL)
    checked = 0
    for step in steps:
        words = re.findall(r"`([^`\n]+)`", step)
        paths = [word for word in words if re.fullmatch(r"[\w/]+\.py", word)]
        texts = [
            place.read_text() for word in paths for place in (ROOT / word, ROOT / "quantlab" / word) if place.is_file()
        ]
        for name in (word for word in words if re.fullmatch(r"_?[A-Za-z][A-Za-z_]{3,}", word) and texts):
            if name not in {"quantization_config", "model_type"}:
                assert any(re.search(rf"\b{name}\b", text) for text in texts), (name, paths)
                checked += 1
    assert checked >= 25
