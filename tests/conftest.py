"""Checkpoints and artifacts shared by many tests; created once per session and read only."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoints import CONFIGS, make_checkpoint

FAMILIES = tuple(CONFIGS)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the processes that tests start
torch.set_num_threads(1)  # tiny models gain nothing from more, and threads of tests side by side wait for each other


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
def two_threads() -> Iterator[None]:
    """Compute with two threads, where the tested code divides its work among them."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def poisoned_gpu() -> None:
    """Fill new GPU memory with NaN, so that elements no kernel writes are detected. Also seed the random generator."""
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    torch.full((1 << 26,), float("nan"), device="cuda")
