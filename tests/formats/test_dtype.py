"""The dtype of a checkpoint, from every spelling of config.json and from the weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlab.checkpoint.index import open_checkpoint
from quantlab.errors import ArtifactError
from quantlab.evaluation.speed.models import layout_of
from quantlab.formats.dtype import dtype_of
from quantlab.plan.compile import compile_plan
from quantlab.recipe.load import load_recipe
from quantlab.runtime.load import load, needed_bytes


def with_dtype(source: Path, copy: Path, weights: torch.dtype, **fields: Any) -> Path:
    """A copy of a checkpoint of one file whose matrices have a dtype, and what config.json says about it."""
    shutil.copytree(source, copy)
    config = json.loads((copy / "config.json").read_text())
    config.pop("torch_dtype")
    (copy / "config.json").write_text(json.dumps(config | fields))
    tensors = load_file(copy / "model.safetensors")
    tensors = {name: t.to(weights) if t.ndim > 1 else t.float() for name, t in tensors.items()}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


SILENT: tuple[dict[str, Any], ...] = (
    {},
    {"dtype": "auto"},
    {"torch_dtype": None},
    {"dtype": None, "torch_dtype": "auto"},
)


@pytest.mark.parametrize("fields", SILENT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_weights_decide_where_the_config_does_not(
    fields: dict[str, Any], dtype: torch.dtype, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source = with_dtype(checkpoints["qwen3"], tmp_path / "c", dtype, **fields)
    word = str(dtype).removeprefix("torch.")
    assert dtype_of(open_checkpoint(source)) == word
    assert layout_of(source).dtype == word
    model = load(source)
    assert model.dtype == dtype
    stored = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.model.embed_tokens.weight, stored)
    assert needed_bytes(source, dtype) > 384 * 128 * 2 * dtype.itemsize


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"dtype": "torch.float16"}, "float16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"torch_dtype": "half"}, "float16"),
        ({"dtype": "auto", "torch_dtype": "float16"}, "float16"),
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "float64"}, "float32"),
        ({"torch_dtype": "float8_e4m3fn"}, "float32"),
    ],
)
def test_every_spelling(fields: dict[str, Any], expected: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = with_dtype(checkpoints["llama"], tmp_path / "c", torch.float32, **fields)
    assert dtype_of(open_checkpoint(source)) == expected
    assert layout_of(source).dtype == expected
    assert load(source).dtype == getattr(torch, expected)


def test_fp8_counts_as_bfloat16_and_scales_do_not_count(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(checkpoints["deepseek_v3"], tmp_path / "c")
    config = json.loads((source / "config.json").read_text())
    del config["torch_dtype"]
    (source / "config.json").write_text(json.dumps(config))
    assert dtype_of(open_checkpoint(source)) == "bfloat16"
    assert layout_of(source).dtype == "bfloat16"
    assert load(source).dtype == torch.bfloat16


@pytest.mark.parametrize("value", ["int4", 5, {"text": "float16"}, ["float16"]])
def test_an_unknown_dtype_is_refused_by_the_plan(value: Any, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = with_dtype(checkpoints["llama"], tmp_path / "c", torch.float32, dtype=value)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {source}\nvariants:\n  int8: [{{quantize: int8}}]\n")
    with pytest.raises(ArtifactError, match="dtype is unknown") as caught:
        compile_plan(load_recipe(recipe).recipe, open_checkpoint(source))
    assert caught.value.found == repr(value)
