"""Checkpoints of bitsandbytes: what bitsandbytes itself stored is read, and what the runtime computes with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlab.checkpoint.index import open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.errors import ArtifactError, CheckpointError
from quantlab.exports.export import export
from quantlab.exports.writers.dense import write_expanded
from quantlab.formats.codecs.table import CODECS
from quantlab.formats.stored import StoredWeights
from quantlab.numerics.number_format import INT8, NF4, ROW, NumberFormat, group
from quantlab.plan.peers import check_peer
from quantlab.recipe.schemes import FormatName
from quantlab.runtime.inventory import expanded
from quantlab.runtime.load import load
from tests.exports.artifacts import make_artifact
from tests.exports.golden.weights import weight as golden_weight
from tests.runtime.tiny import dense_reference, relative_error

GOLDEN = Path(__file__).parents[1] / "exports" / "golden" / "bitsandbytes.safetensors"
TOKENS = torch.arange(1, 33).view(2, 16)


def golden(name: str, prefix: str) -> dict[str, Tensor]:
    found = {key.removeprefix(f"{name}."): one for key, one in load_file(GOLDEN).items() if key.startswith(f"{name}.")}
    return {prefix + key: tensor for key, tensor in found.items()}


def test_int8_rows_of_bitsandbytes_are_read() -> None:
    matrix = golden_weight(25, 40)
    matrix[1, 0] = 0.5
    found = CODECS["bnb-int8"].decode("m.weight", golden("int8", "m."), NumberFormat(INT8, ROW))
    step = matrix.float().abs().amax(1, keepdim=True) / 127
    assert bool(((found.dequantize(torch.float32) - matrix.float()).abs() <= 0.501 * step).all())


def test_double_quantized_levels_of_bitsandbytes_are_read() -> None:
    """The widest gap between levels is 0.304 of a block's magnitude, and double quantization moves that by less than 1 %."""
    matrix = golden_weight(136, 128).float()
    number = NumberFormat(NF4, group(64), scale="F32")
    found = CODECS["bnb-nf4"].decode("m.weight", golden("nf4-double", "m."), number)
    assert found.scale.shape == (136, 2)
    magnitudes = matrix.view(136, 2, 64).abs().amax(2)
    assert relative_error(found.scale, magnitudes) < 0.01
    error = (found.dequantize(torch.float32) - matrix).view(136, 2, 64).abs()
    assert bool((error <= 0.17 * magnitudes[:, :, None]).all())


@pytest.fixture(scope="module", params=["bnb-int8", "bnb-nf4", "bnb-nf4-double"])
def written(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model as `bitsandbytes` would leave it; tests/exports compare these files with its own."""
    format: FormatName = request.param
    root = tmp_path_factory.mktemp("bnb")
    export(make_artifact(checkpoints["qwen3"], "[{cast: bfloat16}]", root), format, root / format, lambda _: None)
    return root / format


def test_the_runtime_computes_with_the_expanded_weights(written: Path, tmp_path: Path) -> None:
    stored = StoredWeights(Reader(open_checkpoint(written)))
    assert stored.method == "bitsandbytes"
    plain = tmp_path / "plain"
    plain.mkdir()
    write_expanded(stored, plain)
    model = load(written, dtype=torch.float32)
    with torch.no_grad():
        found, wanted = (one(input_ids=TOKENS).logits for one in (model, dense_reference(plain)))
    assert relative_error(found, wanted) < 1e-5
    fallbacks = [(one.format, one.held) for one in expanded(model)]
    assert fallbacks == ([] if written.name == "bnb-int8" else [("nf4_g64", "dense")])


def test_a_peer_of_bitsandbytes_says_what_is_not_computed(written: Path, checkpoints: dict[str, Path]) -> None:
    peer = check_peer("other", open_checkpoint(written), open_checkpoint(checkpoints["qwen3"]))
    assert peer.method == "bitsandbytes"
    assert peer.description.startswith(
        "another tool's int8_weight, as bitsandbytes, whose activations are not rounded here; by"
        if written.name == "bnb-int8"
        else "another tool's nf4_g64, as bitsandbytes; by"
    )


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


def test_what_is_not_read_is_refused_from_the_headers(written: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(written, tmp_path / "copy")
    edit(copy, lambda described: described.update(load_in_4bit=True, load_in_8bit=False, bnb_4bit_quant_type="fp4"))
    with pytest.raises(ArtifactError, match="bnb_4bit_quant_type 'fp4'"):
        StoredWeights(Reader(open_checkpoint(copy)))
    shutil.copy(written / "config.json", copy)
    (shard,) = copy.glob("*.safetensors")
    tensors = load_file(shard)
    name = "model.layers.0.mlp.up_proj.weight"
    scale = next(key for key in (f"{name}.absmax", name.replace("weight", "SCB")) if key in tensors)
    (copy / "model.safetensors.index.json").unlink()
    save_file({key: tensor for key, tensor in tensors.items() if key != scale}, shard)
    with pytest.raises(ArtifactError, match="contradict each other"):
        StoredWeights(Reader(open_checkpoint(copy))).stored(name)


def test_scales_that_are_no_numbers_are_refused() -> None:
    stored = {"m.weight": torch.ones(2, 4, dtype=torch.int8), "m.SCB": torch.tensor([1.0, float("nan")])}
    number = NumberFormat(INT8, ROW)
    with pytest.raises(CheckpointError, match="a scale is not usable"):
        CODECS["bnb-int8"].decode("m.weight", stored, number)
    stored = {"m.weight": torch.zeros(2, 4, dtype=torch.int8), "m.SCB": torch.zeros(2)}
    assert not CODECS["bnb-int8"].decode("m.weight", stored, number).dequantize(torch.float32).any()
