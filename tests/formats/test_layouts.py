"""The tables of schemes, layouts and codecs agree with each other."""

from pathlib import Path

import pytest
import torch

from quantlab.checkpoint.header import TensorEntry
from quantlab.errors import ArtifactError, CheckpointError
from quantlab.formats.codecs.table import CODECS
from quantlab.formats.fp8_blocks import parse_config, scales_of
from quantlab.formats.layouts import LAYOUTS, METHODS, method_of_layout
from quantlab.numerics.number_format import (
    E4M3,
    INT4,
    INT8,
    ROW,
    TENSOR,
    Activations,
    NumberFormat,
    block,
    group,
)
from quantlab.recipe.schemes import SCHEMES

FP8 = NumberFormat(E4M3, block(128, 128), scale="F32", activations=Activations(E4M3, 128))


def test_every_layout_has_a_codec_and_a_method() -> None:
    assert set(LAYOUTS) - {"dense"} == set(CODECS)
    for name in CODECS:
        assert method_of_layout(name) in METHODS


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_can_be_expressed_and_written(name: str) -> None:
    scheme = SCHEMES[name]
    assert scheme.name == name, "the word of the recipe is the name of the format"
    assert LAYOUTS[scheme.layout].can_express(scheme.format) is None
    assert CODECS[scheme.layout].encode is not None
    assert method_of_layout(scheme.layout).describe is not None


@pytest.mark.parametrize(
    ("layout", "number", "reason"),
    [
        ("dense", NumberFormat(INT8, ROW), "no place"),
        ("pack-quantized", FP8, "integer"),
        ("pack-quantized", NumberFormat(INT4, group(48)), "32, 64, 128"),
        ("int-quantized", NumberFormat(INT8, TENSOR), "rows"),
        ("int-quantized", NumberFormat(INT8, ROW, symmetric=False), "zero points"),
        ("int-quantized", NumberFormat(INT8, group(64), activations=Activations(INT8)), "per token"),
        ("gptq", NumberFormat(INT4, ROW, symmetric=False), "zero points"),
        ("gptq", NumberFormat(INT8, ROW, activations=Activations(INT8)), "activations"),
        ("gptq_v2", FP8, "integer"),
        ("fp8-blocks", NumberFormat(INT8, ROW), "e4m3"),
        ("fp8-blocks", NumberFormat(E4M3, ROW, scale="F32"), "blocks"),
        ("fp8-blocks", NumberFormat(E4M3, block(128, 128)), "float32"),
    ],
)
def test_a_layout_says_why_it_cannot_express_a_format(layout: str, number: NumberFormat, reason: str) -> None:
    found = LAYOUTS[layout].can_express(number)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize(
    ("number", "name", "description"),
    [
        (SCHEMES["int8"].format, "int8", "W8A8: int8 weights per row, int8 activations per token"),
        (SCHEMES["int4_g64"].format, "int4_g64", "W4A16: int4 weights, one scale per 64"),
        (NumberFormat(INT4, ROW), "int4", "W4A16: int4 weights per row"),
        (NumberFormat(INT8, group(32)), "int8_weight_g32", "W8A16: int8 weights, one scale per 32"),
        (FP8, "fp8_block", "W8A8: FP8 e4m3 weights, one scale per 128 x 128, FP8 e4m3 activations per 128 channels"),
    ],
)
def test_names_and_descriptions(number: NumberFormat, name: str, description: str) -> None:
    assert number.name == name
    assert number.description == description


def test_the_readme_lists_every_scheme_with_its_bits() -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    rows = [line.split(" | ") for line in readme.splitlines() if line.startswith("| `")]
    listed = {
        name.strip(" `"): (row[3].strip("`"), bits)
        for row in rows
        if len(row) == 5
        for name, bits in zip(row[0].strip("| ").split(", "), row[4].rstrip(" |").split(", "), strict=True)
    }
    assert {name: bits for name, (_, bits) in listed.items()} == {
        name: f"{round(scheme.format.bits_per_weight, 3):g}" for name, scheme in SCHEMES.items()
    }
    layouts = {name: layout for name, (layout, _) in listed.items() if name != "fp8_block"}
    assert layouts == {name: scheme.layout for name, scheme in SCHEMES.items() if name != "fp8_block"}


def test_shapes_of_scales_and_shards() -> None:
    assert NumberFormat(INT4, group(32)).scale_shape((7, 96)) == (7, 3)
    assert NumberFormat(INT8, ROW).scale_shape((7, 96)) == (7, 1)
    assert NumberFormat(E4M3, TENSOR).scale_shape((7, 96)) == (1, 1)
    assert FP8.scale_shape((576, 7168)) == (5, 56), "kv_a_proj_with_mqa of V3: a ragged last block"
    assert (FP8.divisor, FP8.shard) == (1, (128, 128))
    assert (NumberFormat(INT4, group(64)).divisor, NumberFormat(INT4, group(64)).shard) == (64, (1, 64))
    assert not NumberFormat(INT4, group(64)).fits((8, 96))


def test_the_block_layout_pairs_weights_and_scales() -> None:
    description = parse_config({"weight_block_size": [128, 128]}, "here")
    weight = TensorEntry("m.weight", "F8_E4M3", (576, 256), Path("a"), 0)
    scale = TensorEntry("m.weight_scale_inv", "F32", (5, 2), Path("b"), 0)
    stored = description.stored("m.weight", {entry.name: entry for entry in (weight, scale)})
    assert stored is not None
    assert stored.parts == (weight, scale)
    assert stored.number == FP8
    planned = LAYOUTS["fp8-blocks"].stored_tensors("m.weight", (576, 256), FP8, "BF16")
    assert planned == tuple((entry.name, entry.dtype, entry.shape) for entry in (weight, scale))
    assert description.stored("m.weight", {"m.weight": TensorEntry("m.weight", "BF16", (2, 2), Path("a"), 0)}) is None
    with pytest.raises(CheckpointError, match="no scale"):
        scales_of({"m.weight": weight}, description)
    with pytest.raises(CheckpointError, match="belongs to no FP8 weight"):
        scales_of({scale.name: scale}, description)
    with pytest.raises(CheckpointError, match="block size"):
        scales_of({entry.name: entry for entry in (weight, scale)}, None)


def test_decoded_blocks_are_their_products() -> None:
    torch.manual_seed(0)
    weight, scale = torch.randn(160, 130).to(torch.float8_e4m3fn), torch.rand(2, 2) + 0.1
    matrix = CODECS["fp8-blocks"].decode("m.weight", {"m.weight": weight, "m.weight_scale_inv": scale}, FP8)
    expected = weight.float() * scale.repeat_interleave(128, 0)[:160].repeat_interleave(128, 1)[:, :130]
    assert torch.equal(matrix.dequantize(torch.float32), expected)


def test_contradicting_packed_integers_are_refused() -> None:
    codec = CODECS["int-quantized"]
    stored = {"m.weight": torch.zeros(2, 4), "m.weight_scale": torch.ones(2, 1)}
    with pytest.raises(ArtifactError, match="contradict"):
        codec.decode("m.weight", stored, NumberFormat(INT8, ROW))
