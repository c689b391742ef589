"""The frame of exports: whole or absent, with a record of what it was made from; the format `dense` in transformers."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantlab.checkpoint.index import open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.errors import ArtifactError
from quantlab.exports import targets
from quantlab.exports.export import export, is_current
from quantlab.exports.writers import checkpoint as shards
from quantlab.exports.writers import table
from quantlab.formats.stored import StoredWeights
from tests.exports.artifacts import make_artifact


@pytest.fixture(scope="module")
def artifact(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(checkpoints["llama"], "[{quantize: int4_g128}]", tmp_path_factory.mktemp("exports"))


def _ignore(_: int) -> None:
    pass


def test_every_format_has_both_halves() -> None:
    assert set(targets.TARGETS) == set(table.WRITERS)


@pytest.mark.parametrize("scheme", ["int8", "int4_g128", "int4_g128_asym", "fp8_block"])
@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_dense_has_every_weight_dequantized(
    family: str, scheme: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    artifact = make_artifact(checkpoints[family], f"[{{quantize: {scheme}}}]", tmp_path)
    seen: list[int] = []
    notes = export(artifact, "dense", tmp_path / "dense", seen.append)
    written = open_checkpoint(tmp_path / "dense")
    assert "quantization_config" not in written.config
    stored = StoredWeights(Reader(open_checkpoint(artifact)))
    names = list(stored.names())
    assert list(written.tensors) == names
    assert sum(seen) == sum(stored.elements(name) for name in names)
    for name in names:
        tensor = Reader(written).read(name)
        number = stored.format_of(name)
        dtype = torch.bfloat16 if number is not None else tensor.dtype
        assert tensor.dtype == dtype
        assert torch.equal(tensor, stored.read_dense(name, tensor.dtype))
    assert bool(notes) == (scheme in {"int8", "fp8_block"})


def test_transformers_loads_dense_without_missing_tensors(artifact: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export(artifact, "dense", tmp_path / "dense", _ignore)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_export_records_what_it_was_made_from(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "dense"
    export(artifact, "dense", out, _ignore)
    content = json.loads((out / "export.json").read_text())
    assert content["format"] == "dense"
    assert (out / content["artifact"]).resolve() == artifact.resolve()
    assert content["artifact_key"] == json.loads((artifact / "manifest.json").read_text())["key"]
    assert set(content["files"]) == {path.name for path in out.iterdir()} - {"export.json"}
    assert {"config.json", "generation_config.json", "tokenizer_config.json"} <= set(content["files"])
    for name, file in content["files"].items():
        data = (out / name).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (file["sha256"], file["bytes"])
    assert is_current(artifact, "dense", out)
    (out / "config.json").write_text("{}")
    assert not is_current(artifact, "dense", out)


def test_weights_are_divided_into_shards(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "LARGEST_SHARD", 200_000)
    export(artifact, "dense", tmp_path / "dense", _ignore)
    files = sorted((tmp_path / "dense").glob("*.safetensors"))
    assert len(files) > 3
    sizes = [[tensor.nbytes for tensor in load_file(file).values()] for file in files]
    assert all(sum(one) <= 200_000 or len(one) == 1 for one in sizes)
    total = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total == sum(map(sum, sizes))


def test_nothing_stays_after_a_failure(artifact: Path, tmp_path: Path) -> None:
    def fail(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(artifact, "dense", tmp_path / "exports" / "dense", fail)
    assert list((tmp_path / "exports").iterdir()) == []


def test_what_exists_is_replaced_only_if_asked_and_ours(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "dense"
    export(artifact, "dense", out, _ignore)
    with pytest.raises(ArtifactError, match="the directory of the export exists"):
        export(artifact, "dense", out, _ignore)
    export(artifact, "dense", out, _ignore, overwrite=True)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ArtifactError, match="did not make"):
        export(artifact, "dense", tmp_path / "mine", _ignore, overwrite=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_only_finished_artifacts_are_exported(artifact: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="the directory is not a quantlab artifact"):
        export(checkpoints["llama"], "dense", tmp_path / "dense", _ignore)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in artifact.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    next(damaged.glob("*.safetensors")).unlink()
    with pytest.raises(ArtifactError, match="the artifact is incomplete"):
        export(damaged, "dense", tmp_path / "dense", _ignore)
