"""Scales as other tools store them: every dtype is read for what it means, or refused; so is every value."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlab.checkpoint.header import TensorEntry
from quantlab.checkpoint.index import INDEX_NAME, open_checkpoint
from quantlab.checkpoint.reader import DTYPE_NAMES, Reader
from quantlab.errors import CheckpointError
from quantlab.formats.codecs.table import CODECS
from quantlab.formats.compressed_tensors import parse_config as parse_compressed_tensors
from quantlab.formats.gptq import parse_config as parse_gptq
from quantlab.formats.layout import Description
from quantlab.formats.stored import StoredWeights
from quantlab.plan.compile import compile_plan
from quantlab.recipe.load import load_recipe
from quantlab.recipe.schemes import SCHEMES
from quantlab.run.directory import RunDirectory
from quantlab.run.execute import make_artifacts
from tests.checkpoints import all_linears, reference_dequantize
from tests.formats.test_float_quantized import described as described_floats

WEIGHT = "model.layers.1.mlp.experts.3.down_proj.weight"
SCALE = WEIGHT + "_scale_inv"


def with_scales(source: Path, copy: Path, change: Callable[[Tensor], Tensor], *, scale_fmt: str | None = None) -> Path:
    """A copy of an FP8 checkpoint whose scales are changed."""
    shutil.copytree(source, copy)
    for path in copy.glob("*.safetensors"):
        tensors = {n: change(t) if n.endswith("_scale_inv") else t for n, t in load_file(path).items()}
        save_file(tensors, path)
    if scale_fmt is not None:
        config = json.loads((copy / "config.json").read_text())
        config["quantization_config"]["scale_fmt"] = scale_fmt
        (copy / "config.json").write_text(json.dumps(config))
    return copy


def with_one_scale(source: Path, copy: Path, value: float) -> Path:
    """A copy of an FP8 checkpoint with another value in one scale."""
    shutil.copytree(source, copy)
    shard = copy / json.loads((copy / INDEX_NAME).read_text())["weight_map"][SCALE]
    tensors = load_file(shard)
    tensors[SCALE][0, 0] = value
    save_file(tensors, shard)
    return copy


def exponents(scale: Tensor) -> Tensor:
    """Powers of two as the bytes of UE8M0: the exponent plus 127."""
    return (scale.log2().round() + 127).to(torch.uint8)


def plan_of(source: Path, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {source}\nvariants:\n  w4a16: [{{quantize: int4_g128}}]\n")
    loaded = load_recipe(recipe)
    return loaded, compile_plan(loaded.recipe, open_checkpoint(source))


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e8m0fnu])
def test_floating_scales_are_read_as_numbers(
    dtype: torch.dtype, scale_fmt: str | None, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    def change(scale: Tensor) -> Tensor:
        return scale.log2().round().exp2().to(dtype)  # a power of two is a number of all of them

    source = with_scales(checkpoints["deepseek_v3"], tmp_path / "c", change, scale_fmt=scale_fmt)
    plan_of(source, tmp_path)
    stored = StoredWeights(Reader(open_checkpoint(source)))
    reader = stored.reader
    expected = reference_dequantize(reader.read(WEIGHT), reader.read(SCALE).float())
    assert torch.equal(stored.read_dense(WEIGHT, torch.bfloat16), expected)


def test_bytes_are_exponents_where_the_config_says_so(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = with_scales(checkpoints["deepseek_v3"], tmp_path / "c", exponents, scale_fmt="ue8m0")
    plan_of(source, tmp_path)
    stored = StoredWeights(Reader(open_checkpoint(source)))
    original = StoredWeights(Reader(open_checkpoint(checkpoints["deepseek_v3"]))).reader
    scale = original.read(SCALE).log2().round().exp2()
    expected = reference_dequantize(original.read(WEIGHT), scale)
    assert torch.equal(stored.read_dense(WEIGHT, torch.bfloat16), expected)


@pytest.mark.parametrize(
    ("dtype", "scale_fmt"),
    [(torch.uint8, None), (torch.uint8, "float"), (torch.int32, "ue8m0"), (torch.int8, None), (torch.int64, None)],
)
def test_other_scales_are_refused_by_the_plan(
    dtype: torch.dtype, scale_fmt: str | None, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source = with_scales(
        checkpoints["deepseek_v3"], tmp_path / "c", lambda s: exponents(s).to(dtype), scale_fmt=scale_fmt
    )
    with pytest.raises(CheckpointError, match="dtype quantlab does not read") as caught:
        plan_of(source, tmp_path)
    assert caught.value.found == DTYPE_NAMES[dtype]
    assert "_scale_inv" in (caught.value.where or "")


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan"), float("inf")])
def test_unusable_scales_are_refused_with_tensor_and_value(
    value: float, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source = with_one_scale(checkpoints["deepseek_v3"], tmp_path / "c", value)
    loaded, plan = plan_of(source, tmp_path)
    out = RunDirectory(tmp_path / "out")
    with pytest.raises(CheckpointError, match="a scale is not usable") as caught:
        make_artifacts(plan, loaded, out, lambda _: lambda _: None)
    assert caught.value.where == SCALE
    assert f"{value:g} at [0, 0]" in (caught.value.found or "")
    assert not out.artifact("w4a16").exists()


def test_a_vector_of_fp8_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(checkpoints["deepseek_v3"], tmp_path / "c")
    name = "model.layers.1.input_layernorm.weight"
    shard = source / json.loads((source / INDEX_NAME).read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[name + "_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, shard)
    index = json.loads((source / INDEX_NAME).read_text())
    index["weight_map"][name + "_scale_inv"] = shard.name
    (source / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="FP8 that cannot have blocks"):
        plan_of(source, tmp_path)


def _words(rows: int, columns: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (rows, columns), dtype=torch.int32)


def _compressed(scheme: str) -> Description:
    return parse_compressed_tensors(all_linears(SCHEMES[scheme]).to_json(), "config.json")


GPTQ = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}
LAYOUTS: dict[str, tuple[Description, dict[str, Tensor], str, bool]] = {
    "pack-quantized": (_compressed("int4_g128"), {"m.weight_packed": _words(64, 32)}, "m.weight_scale", True),
    "int-quantized": (_compressed("int8"), {"m.weight": torch.ones(64, 256, dtype=torch.int8)}, "m.weight_scale", True),
    "float-quantized": (
        parse_compressed_tensors(described_floats("channel"), "config.json"),
        {"m.weight": torch.ones(64, 256).to(torch.float8_e4m3fn)},
        "m.weight_scale",
        False,
    ),
    "gptq": (parse_gptq(GPTQ, "config.json"), {"m.qweight": _words(32, 64)}, "m.scales", True),
}
SHAPES = {"pack-quantized": (64, 2), "int-quantized": (64, 1), "float-quantized": (64, 1), "gptq": (2, 64)}


def decode(layout: str, scale: Tensor) -> None:
    description, numbers, name, _ = LAYOUTS[layout]
    tensors = numbers | {name: scale}
    entries = {n: TensorEntry(n, DTYPE_NAMES[t.dtype], tuple(t.shape), Path("x"), 0) for n, t in tensors.items()}
    found = description.stored("m.weight", entries)
    assert found is not None
    CODECS[found.layout].decode("m.weight", tensors, found.number)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_of_other_layouts(layout: str) -> None:
    usable = torch.full(SHAPES[layout], 0.5, dtype=torch.bfloat16)
    decode(layout, usable)
    for dtype in (torch.uint8, torch.int32, torch.int8):
        with pytest.raises(CheckpointError, match="dtype quantlab does not read"):
            decode(layout, usable.to(dtype))
    for value in (0.0, float("nan"), float("inf"), -float("inf")):
        broken = usable.clone()
        broken[1, 0] = value
        with pytest.raises(CheckpointError, match="a scale is not usable"):
            decode(layout, broken)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_integers_may_have_negative_scales(layout: str) -> None:
    """Half of the scales of the signed grid are negative, here and in AutoRound's models."""
    negative = torch.full(SHAPES[layout], -0.5, dtype=torch.bfloat16)
    if LAYOUTS[layout][3]:
        decode(layout, negative)
    else:
        with pytest.raises(CheckpointError, match="negative or not finite"):
            decode(layout, negative)
