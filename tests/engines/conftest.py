"""Fake engines: small scripts that answer, or fail in every way an engine can."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from quantlab.evaluation.engines.engine import ENGINES, Engine

ANSWER = """
import json, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file, save_file

request = json.loads(Path(sys.argv[1]).read_text())
results = Path(sys.argv[2])
count = sum(len(document) - 1 for document in request["documents"])
tensors = {"nll": np.full(count, 2.0, dtype=np.float32), "top": np.zeros(count, dtype=np.int64)}
if request["greedy"]:
    tensors["greedy"] = np.zeros((len(request["greedy"]["prompts"]), request["greedy"]["tokens"]), dtype=np.int64)
report = {"version": "1.2", "dtype": request["dtype"], "modules": [{"module": "Linear", "scheme": None, "count": 1}]}
"""
"""The beginning of a fake script: an answer of the right form."""
WRITE = """
save_file(tensors, results / "result.safetensors")
(results / "result.json").write_text(json.dumps(report))
"""
"""Its end."""


@pytest.fixture
def fake(tmp_path: Path) -> Callable[[str], Engine]:
    """Make an engine from the text of its script; the package numpy plays the engine's."""

    def make(script: str) -> Engine:
        folder = tmp_path / "engine"
        (folder / "scripts").mkdir(parents=True, exist_ok=True)
        (folder / "scripts" / "fake.py").write_text(script)
        return replace(
            ENGINES["transformers"], stem="fake", package="numpy", module="numpy", folder=folder, seconds=60.0
        )

    return make
