"""FP8 of compressed-tensors against the library's compressor and transformers' model of the same weights."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig as TheirConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlab.checkpoint.header import TensorEntry
from quantlab.checkpoint.reader import DTYPE_NAMES
from quantlab.errors import ArtifactError
from quantlab.formats.codecs.table import CODECS
from quantlab.formats.compressed_tensors import QuantizationConfig, parse_config
from quantlab.formats.layouts import LAYOUTS
from quantlab.runtime.inventory import expanded
from quantlab.runtime.load import load
from tests.runtime.tiny import dense_reference, edit_config, relative_error, tokens, write_checkpoint

STRATEGIES: dict[str, dict[str, Any]] = {
    "channel": {"strategy": "channel"},
    "tensor": {"strategy": "tensor"},
    "block": {"strategy": "block", "block_structure": [64, 128]},
}


def described(strategy: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, **STRATEGIES[strategy]}
    activations = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "format": "float-quantized"}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def scales(W: Tensor, strategy: str) -> Tensor:
    rows, columns = W.shape
    r, c = {"channel": (1, columns), "tensor": (rows, columns), "block": (64, 128)}[strategy]
    blocks = W.float().view(rows // r, r, columns // c, c)
    found = blocks.abs().amax((1, 3)) / 448
    return (found.view(1) if strategy == "tensor" else found).bfloat16()


def rounded(W: Tensor, scale: Tensor) -> Tensor:
    grid = scale.view(-1, 1) if scale.dim() == 1 else scale
    full = grid.repeat_interleave(W.shape[0] // grid.shape[0], 0).repeat_interleave(W.shape[1] // grid.shape[1], 1)
    return (W.float() / full.float()).clamp(-448, 448).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_decoded_as_their_decompressor_does(strategy: str) -> None:
    torch.manual_seed(0)
    W = torch.randn(128, 256) * 0.02
    scale = scales(W, strategy)
    stored = {"m.weight": rounded(W, scale), "m.weight_scale": scale}
    config = parse_config(described(strategy), "config.json")
    entries = {
        name: TensorEntry(name, DTYPE_NAMES[t.dtype], tuple(t.shape), Path("x"), 0) for name, t in stored.items()
    }
    found = config.stored("m.weight", entries)
    assert found is not None
    assert found.layout == "float-quantized"
    matrix = CODECS[found.layout].decode("m.weight", stored, found.number)
    theirs = TheirConfig.model_validate(described(strategy)).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    parts = {name.removeprefix("m."): tensor.clone() for name, tensor in stored.items()}
    assert torch.equal(matrix.dequantize(torch.bfloat16), compressor.decompress(parts, theirs)["weight"])
    planned = LAYOUTS[found.layout].stored_tensors("m.weight", (128, 256), found.number, "BF16")
    assert planned[0] == ("m.weight", "F8_E4M3", (128, 256))
    assert planned[1][2] == matrix.scale.shape


def test_descriptions_survive_a_round_trip() -> None:
    for strategy in STRATEGIES:
        config = parse_config(described(strategy), "config.json")
        assert isinstance(config, QuantizationConfig)
        assert parse_config(config.to_json(), "config.json") == config
        TheirConfig.model_validate(config.to_json())


@pytest.mark.parametrize("change", [{"dynamic": False}, {"strategy": "tensor"}, {"symmetric": False}])
def test_activations_with_stored_scales_are_refused(change: dict[str, Any]) -> None:
    config = described("channel")
    config["config_groups"]["group_0"]["input_activations"] |= change
    with pytest.raises(ArtifactError, match="a number format that quantlab does not read"):
        parse_config(config, "config.json")


def test_the_runtime_loads_it_expanded_and_says_so(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "llama")
    artifact = shutil.copytree(source, tmp_path / "artifact")
    dense = shutil.copytree(source, tmp_path / "dense")
    stored, meant = {}, {}
    for name, W in load_file(source / "model.safetensors").items():
        stored[name] = meant[name] = W
        if name.endswith("proj.weight"):
            scale = scales(W, "channel")
            stored |= {name: rounded(W, scale), f"{name}_scale": scale}
            meant[name] = (stored[name].float() * scale.float()).bfloat16()
    save_file(stored, artifact / "model.safetensors", metadata={"format": "pt"})
    save_file(meant, dense / "model.safetensors", metadata={"format": "pt"})
    edit_config(artifact, lambda fields: fields.update(quantization_config=described("channel")))
    model = load(artifact, dtype=torch.float32)
    with torch.no_grad():
        found, expected = (one(input_ids=tokens()).logits for one in (model, dense_reference(dense)))
    assert relative_error(found, expected) < 1e-5
    (fallback,) = expanded(model)
    assert (fallback.format, fallback.held) == ("fp8", "dense")
