"""Whole float32 models of four families, each loaded once, with a record of their run on the calibration tokens."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from tests.calibration.oracle import Seen, dense_weights, load_model, tokens, watch, write_dense
from tests.checkpoints import CONFIGS


@dataclass(frozen=True)
class Whole:
    """A family's tiny model.

    Attributes:
        source: the checkpoint as released; FP8 for DeepSeek-V3.
        dense: the same checkpoint in float32, without quantization.
        weights: weights of `dense`.
        model: transformers' model of `dense`.
        seen: record of its run.
    """

    source: Path
    dense: Path
    weights: dict[str, Tensor]
    model: PreTrainedModel
    seen: Seen


@pytest.fixture(scope="session")
def wholes(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Whole]:
    root = tmp_path_factory.mktemp("dense")
    result = {}
    for family in CONFIGS:
        dense = write_dense(checkpoints[family], root / family)
        model = load_model(dense)
        result[family] = Whole(checkpoints[family], dense, dense_weights(dense), model, watch(model, tokens()))
    return result


@pytest.fixture(params=list(CONFIGS))
def whole(request: pytest.FixtureRequest, wholes: dict[str, Whole]) -> Whole:
    return wholes[request.param]
