"""Checkpoints whose config.json ties the head to the embeddings and whose files hold a head all the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantlab.checkpoint.index import open_checkpoint
from quantlab.errors import CheckpointError
from quantlab.plan.compile import compile_plan
from quantlab.recipe.load import load_recipe
from quantlab.runtime.load import load
from tests.conftest import FAMILIES


def with_head(source: Path, copy: Path, head: Tensor | None) -> Path:
    """A copy of a checkpoint with tied embeddings and a stored head; None for the embeddings themselves."""
    shutil.copytree(source, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    for path in copy.glob("*.safetensors"):
        tensors = load_file(path)
        if "lm_head.weight" in tensors:
            embeddings = next(
                found["model.embed_tokens.weight"]
                for other in copy.glob("*.safetensors")
                if "model.embed_tokens.weight" in (found := load_file(other))
            )
            tensors["lm_head.weight"] = embeddings.clone() if head is None else head
            save_file(tensors, path, metadata={"format": "pt"})
    return copy


def plan(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {source}\nvariants:\n  w4a16: [{{quantize: int4_g128}}]\n")
    compile_plan(load_recipe(recipe).recipe, open_checkpoint(source))


@pytest.mark.parametrize("family", FAMILIES)
def test_another_head_is_refused(family: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = with_head(checkpoints[family], tmp_path / "c", torch.randn(384, 128).bfloat16())
    for attempt in (lambda: plan(source, tmp_path), lambda: load(source)):
        with pytest.raises(CheckpointError, match="the stored head differs") as caught:
            attempt()
        assert "lm_head.weight" in (caught.value.where or "")
        assert "tie_word_embeddings: false" in (caught.value.fix or "")


def test_one_other_value_at_the_end_is_seen(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    head = load_file(checkpoints["llama"] / "model.safetensors")["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1
    with pytest.raises(CheckpointError, match="the stored head differs"):
        plan(with_head(checkpoints["llama"], tmp_path / "c", head), tmp_path)


def test_a_head_of_another_dtype_or_shape_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for number, head in enumerate((torch.zeros(384, 128), torch.zeros(383, 128, dtype=torch.bfloat16))):
        source = with_head(checkpoints["llama"], tmp_path / str(number), head)
        with pytest.raises(CheckpointError, match="the stored head differs"):
            plan(source, tmp_path)


def test_an_equal_head_is_the_model_that_transformers_runs(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = with_head(checkpoints["llama"], tmp_path / "c", None)
    plan(source, tmp_path)
    ids = torch.arange(16)[None]
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.inference_mode():
        found, expected = load(source, dtype=torch.float32)(ids).logits, theirs(ids).logits
    assert (found - expected).norm() / expected.norm() < 1e-5
