"""Facts that records copy from a manifest, and artifacts that were changed after they were made."""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from quantlab.errors import ArtifactError
from quantlab.evaluation.evaluate import evaluate
from quantlab.evaluation.manifest import (
    check_unchanged,
    kept_experts,
    matrix_errors,
    read_manifest,
    tokens_per_expert,
    weights_sha256,
)
from quantlab.evaluation.measured import Measured
from quantlab.evaluation.memory.metrics import Memory
from quantlab.evaluation.record import Record, read_record
from quantlab.evaluation.request import EvaluatedArtifact, EvaluationRequest
from tests.evaluation.test_verify import make

LEDGER = [
    {"tensor": "model.layers.2.mlp.experts.0.up_proj.weight", "relative_error": 0.1, "output_error": 0.01},
    {"tensor": "model.layers.2.mlp.experts.1.up_proj.weight", "relative_error": 0.3, "output_error": 0.05},
    {
        "tensor": "model.layers.2.mlp.experts.2.up_proj.weight",
        "relative_error": 0.2,
        "output_error": 0.09,
        "fallback": "rtn",
    },
    {"tensor": "model.layers.10.self_attn.o_proj.weight", "relative_error": 0.4},
    {"tensor": "model.norm.weight"},
    {"tensor": "lm_head.weight", "relative_error": 0.5},
]


def test_errors_are_gathered_by_layer_and_kind() -> None:
    experts, attention, head = matrix_errors({"ledger": LEDGER})
    assert (experts.layer, experts.kind, experts.count) == ("layer 2", "mlp.experts.up_proj", 3)
    assert (experts.relative_error, experts.relative_error_max) == (0.2, 0.3)
    assert (experts.output_error, experts.output_error_max) == (0.05, 0.09)
    assert experts.worst == "model.layers.2.mlp.experts.2.up_proj.weight"
    assert experts.fallbacks == {"rtn": 1}
    assert (attention.layer, attention.output_error) == ("layer 10", None)
    assert (head.layer, head.kind) == ("outside the layers", "lm_head")
    assert matrix_errors({}) == ()
    assert tokens_per_expert({"tokens_per_expert": {"layer 1": [3, 4]}}) == {"layer 1": (3, 4)}
    assert kept_experts({}) == {}


@pytest.fixture
def artifact(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return make(checkpoints["llama"], "  w4a16: [{quantize: int4_g128}]\n", tmp_path).artifact("w4a16")


def _flip(artifact: Path) -> None:
    """Flip one bit of a weight without changing the file's size or name."""
    path = next(artifact.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    later = time.time_ns() + 10**9
    os.utime(path, ns=(later, later))


def _extend(artifact: Path) -> None:
    path = artifact / "config.json"
    before = path.stat()
    path.write_bytes(path.read_bytes() + b" ")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a weight": (_flip, "sha256"),
    "a file's size": (_extend, "bytes, the manifest says"),
    "a file is gone": (lambda artifact: (artifact / "config.json").unlink(), "missing"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_artifact_is_not_evaluated(name: str, artifact: Path, suite: Path, tmp_path: Path) -> None:
    check_unchanged(artifact)
    assert any(error.kind == "self_attn.o_proj" for error in matrix_errors(read_manifest(artifact)))
    change, found = CHANGES[name]
    change(artifact)
    artifacts = (EvaluatedArtifact("w4a16", "", artifact, "artifacts/w4a16", "0"),)
    request = EvaluationRequest(
        directory=tmp_path / "run", recipe="r", recipe_sha256="r", suite=suite, baseline="w4a16", artifacts=artifacts
    )
    with pytest.raises(ArtifactError, match="changed since it was made") as raised:
        evaluate(request)
    assert found in str(raised.value.found)
    assert not (tmp_path / "run").exists()


def test_a_file_that_was_only_touched_is_hashed_and_taken(artifact: Path) -> None:
    later = time.time_ns() + 10**9
    for path in artifact.iterdir():
        if path.name != "manifest.json":
            os.utime(path, ns=(later, later))
    check_unchanged(artifact)


def test_weights_are_known_by_their_contents_and_read_once(tmp_path: Path) -> None:
    shards, known = (tmp_path / "b.safetensors", tmp_path / "a.safetensors"), tmp_path / "known.json"
    for number, path in enumerate(shards):
        path.write_bytes(bytes([number]) * 100)
    contents = [hashlib.sha256(bytes([number]) * 100).hexdigest() for number in (1, 0)]
    first = weights_sha256(shards, known)
    assert first == hashlib.sha256("\n".join(contents).encode()).hexdigest()
    assert weights_sha256(shards[::-1], known) == first
    _flip(tmp_path)
    assert weights_sha256(shards, known) != first
    known.write_text(known.read_text().replace(contents[0], "kept").replace(contents[1], "kept"))
    assert "kept" in known.read_text()
    before = weights_sha256(shards, known)
    assert before == weights_sha256(shards, known)
    known.unlink()
    assert weights_sha256(shards, known) != before, "the kept hash was taken for a file that had not changed"


def record() -> Record:
    one = Measured(value=1, low=1, high=1, n=1)
    memory = Memory(
        weights_bytes=1,
        fp16_weights_bytes=1,
        quantized_weights_percent_of_fp16=None,
        artifact_bytes=1,
        peak_memory_bytes=1,
        load_seconds=one,
    )
    return Record(
        recipe="r",
        recipe_sha256="r",
        variant="v",
        description="d",
        artifact="a",
        artifact_sha256="a",
        baseline="b",
        suite="s 1",
        suite_sha256="s",
        hardware="h",
        versions={},
        quality=None,
        memory=memory,
        speed=None,
        failures=(),
    )


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"surprise": 1}, "surprise"),
        ({"memory": {"weights_bytes": "many"}}, "memory.weights_bytes"),
    ],
)
def test_a_record_of_another_version_is_refused(change: dict[str, object], where: str, tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    path.write_text(record().model_dump_json())
    assert read_record(path) == record()
    fields = json.loads(path.read_text())
    for name, value in change.items():
        fields[name] = fields[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(fields))
    with pytest.raises(ArtifactError, match="not a record of this version") as raised:
        read_record(path)
    assert re.search(rf"v\.json, {where}", str(raised.value.where))
    assert raised.value.fix is not None


def test_records_of_the_first_version_are_still_read(tmp_path: Path) -> None:
    """Fields added later read as not measured in an old record."""
    path = tmp_path / "v.json"
    old = record().model_dump(mode="json")
    for name in ("tasks", "matrix_errors", "seeds", "command", "suite_name", "suite_version", "tokens_per_expert"):
        del old[name]
    for name in ("kv_cache_bytes_per_token", "kv_cache"):
        del old["memory"][name]
    path.write_text(json.dumps(old))
    assert read_record(path) == record()
