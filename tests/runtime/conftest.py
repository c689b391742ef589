"""Fixtures of the runtime's tests: tiny checkpoints and artifacts, each created once per session."""

from collections.abc import Callable
from pathlib import Path

import pytest

from quantlab.recipe.schemes import SCHEMES, SchemeName
from tests.runtime.tiny import FAMILIES, Artifact, quantize, write_checkpoint


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: write_checkpoint(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def artifacts(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, SchemeName], Artifact]:
    root = tmp_path_factory.mktemp("artifacts")
    made: dict[tuple[str, SchemeName], Artifact] = {}

    def artifact(family: str, scheme: SchemeName) -> Artifact:
        if (family, scheme) not in made:
            made[family, scheme] = quantize(checkpoints[family], root / f"{family}-{scheme}", SCHEMES[scheme])
        return made[family, scheme]

    return artifact
