"""Checkpoints and artifacts shared by many tests; created once per session and read only."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.checkpoints import CONFIGS, make_checkpoint

FAMILIES = tuple(CONFIGS)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny checkpoint per family."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: make_checkpoint(root / family, family) for family in FAMILIES}


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe over a checkpoint: `write_recipe(directory, variants)`."""

    def write(model: Path, variants: str, *, name: str = "recipe") -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"model: {model}\nvariants:\n{variants}")
        return path

    return write


@pytest.fixture
def poisoned_gpu() -> None:
    """Fill new GPU memory with NaN, so that elements no kernel writes are detected. Also seed the random generator."""
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    torch.full((1 << 26,), float("nan"), device="cuda")
