"""Encoding against compressed-tensors' compressors, and the description against its pydantic models."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig as TheirConfig
from compressed_tensors.quantization import QuantizationScheme

from quantlab.algorithms.rtn import rtn
from quantlab.errors import ArtifactError
from quantlab.formats.codecs.table import CODECS, encode
from quantlab.formats.compressed_tensors import Group, QuantizationConfig, parse_config
from quantlab.formats.layouts import LAYOUTS
from quantlab.recipe.schemes import DTYPE_WORDS, SCHEMES
from tests.checkpoints import INTEGERS, all_linears


def _theirs(name: str) -> QuantizationScheme:
    config = all_linears(SCHEMES[name], ()).to_json()
    return TheirConfig.model_validate(config).config_groups["group_0"]


@pytest.mark.parametrize("rows", [48, 45])
@pytest.mark.parametrize("grid", ["absmax", "signed", "minmax"])
@pytest.mark.parametrize("name", sorted(INTEGERS))
def test_their_decompressor_reads_what_we_write(name: str, grid: str, rows: int) -> None:
    torch.manual_seed(0)
    scheme = SCHEMES[name]
    number = scheme.format
    if number.symmetric == (grid == "minmax"):
        pytest.skip("the grid with zero points is that of asymmetric formats")
    W = torch.randn(rows, 256) * 0.02 + 0.01 * torch.randn(rows, 1)
    matrix = rtn(W, bits=number.bits, group_size=number.group_size, scale_dtype=torch.bfloat16, grid=grid)
    stored = encode(scheme.layout, "m.weight", matrix)
    layout = [
        (
            key,
            {torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.bfloat16: "BF16"}[t.dtype],
            tuple(t.shape),
        )
        for key, t in stored.items()
    ]
    planned = LAYOUTS[scheme.layout].stored_tensors("m.weight", (rows, 256), number, DTYPE_WORDS["bfloat16"])
    assert tuple(layout) == planned
    compressor = BaseCompressor.get_value_from_registry(scheme.layout)
    theirs = compressor.decompress({key.removeprefix("m."): t.clone() for key, t in stored.items()}, _theirs(name))
    assert torch.equal(theirs["weight"], matrix.dequantize(torch.bfloat16))
    again = CODECS[scheme.layout].decode("m.weight", stored, number)
    assert torch.equal(again.q, matrix.q)
    assert torch.equal(again.scale, matrix.scale)
    assert (again.zero is None) == number.symmetric
    assert matrix.zero is None or torch.equal(again.zero, matrix.zero)


@pytest.mark.parametrize("rows", [64, 45])
@pytest.mark.parametrize("group", [128, 64, 32])
def test_zero_points_are_the_words_their_compressor_writes(group: int, rows: int) -> None:
    torch.manual_seed(0)
    (scheme,) = (one for name, one in SCHEMES.items() if name == f"int4_g{group}_asym")
    W = torch.randn(rows, 256) * 0.02 + 0.02 * torch.randn(rows, 1)
    matrix = rtn(W, bits=4, group_size=group, scale_dtype=torch.bfloat16, grid="minmax")
    assert matrix.zero is not None
    assert len(matrix.zero.unique()) > 4
    compressor = BaseCompressor.get_value_from_registry(scheme.layout)
    parts = {"weight": W, "weight_scale": matrix.scale, "weight_zero_point": matrix.zero}
    theirs = compressor.compress(parts, _theirs(f"int4_g{group}_asym"))
    ours = {key.removeprefix("m."): tensor for key, tensor in encode(scheme.layout, "m.weight", matrix).items()}
    assert torch.equal(ours["weight_zero_point"], theirs["weight_zero_point"])
    assert set(ours) == set(theirs)


def test_missing_and_misshapen_zero_points_are_refused() -> None:
    scheme = SCHEMES["int4_g128_asym"]
    matrix = rtn(torch.randn(48, 256), bits=4, group_size=128, scale_dtype=torch.bfloat16, grid="minmax")
    stored = encode(scheme.layout, "m.weight", matrix)
    decode = CODECS[scheme.layout].decode
    for change in (stored["m.weight_zero_point"][:-1], stored["m.weight_zero_point"].to(torch.int8)):
        with pytest.raises(ArtifactError, match="zero points"):
            decode("m.weight", stored | {"m.weight_zero_point": change}, scheme.format)
    del stored["m.weight_zero_point"]
    with pytest.raises(ArtifactError, match="zero points missing"):
        decode("m.weight", stored, scheme.format)


def test_description_survives_a_round_trip() -> None:
    int4, int8 = SCHEMES["int4_g128"], SCHEMES["int8"]
    config = QuantizationConfig(
        (
            Group((r"re:.*mlp\.experts.*",), int4.format, int4.layout),
            Group((r"re:.*self_attn\.(?!kv_b_proj).*",), int8.format, int8.layout),
        ),
        ("lm_head", r"re:.*mlp\.gate$"),
    )
    assert parse_config(config.to_json(), where="here") == config
    assert config.to_json()["format"] == "mixed-precision"
    expected = {
        "model.layers.1.mlp.experts.3.up_proj": "int4_g128",
        "model.layers.1.self_attn.q_a_proj": "int8",
        "model.layers.1.self_attn.kv_b_proj": None,
        "model.layers.1.mlp.gate": None,
        "lm_head": None,
    }
    for module, scheme in expected.items():
        found = config.format_of(module)
        assert (found.name if found else None) == scheme


@pytest.mark.parametrize(
    "change",
    [
        {"num_bits": 3},
        {"symmetric": False},
        {"type": "float"},
        {"group_size": 100, "strategy": "group"},
        {"strategy": "tensor"},
    ],
)
def test_numbers_we_do_not_read_are_refused(change: dict) -> None:
    config = all_linears(SCHEMES["int8_weight"], ()).to_json()
    config["config_groups"]["group_0"]["weights"].update(change)
    with pytest.raises(ArtifactError, match="a number format that quantlab does not read"):
        parse_config(config, where="config.json")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"config_groups": [1]}, "config_groups"),
        ({"config_groups": {"group_7": [1]}}, "group_7"),
        ({"config_groups": {"group_7": {"weights": 4}}}, "group_7"),
        ({"ignore": ["lm_head", 3]}, "ignore"),
        ({"ignore": ["re:["]}, "ignore"),
        ({"sparsity_config": [2]}, "sparsity_config"),
    ],
)
def test_malformed_descriptions_are_refused(change: dict, where: str) -> None:
    config = all_linears(SCHEMES["int8_weight"], ()).to_json()
    with pytest.raises(ArtifactError, match=rf"where: config\.json, {where}"):
        parse_config(config | change, where="config.json")


@pytest.mark.parametrize("targets", [None, "Linear", ["re:("]])
def test_malformed_targets_are_refused(targets: object) -> None:
    config = all_linears(SCHEMES["int8_weight"], ()).to_json()
    config["config_groups"]["group_0"]["targets"] = targets
    with pytest.raises(ArtifactError, match="group_0, targets"):
        parse_config(config, where="config.json")


@pytest.mark.parametrize(
    "change", [{"symmetric": False}, {"strategy": "tensor"}, {"dynamic": False}, {"num_bits": 4}, {"type": "float"}]
)
def test_activations_we_do_not_compute_with_are_refused(change: dict) -> None:
    config = all_linears(SCHEMES["int8"], ()).to_json()
    config["config_groups"]["group_0"]["input_activations"].update(change)
    with pytest.raises(ArtifactError, match="a number format that quantlab does not read"):
        parse_config(config, where="config.json")
