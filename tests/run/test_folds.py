"""Folds leave the function of a layer unchanged: biases included, unknown tensors refused, every fold checked on text."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantlab.errors import CheckpointError, PlanError
from quantlab.run import edits
from quantlab.runtime.decode import Decoder
from quantlab.runtime.load import load
from tests.checkpoints import CONFIGS, make_checkpoint
from tests.run.test_calibrated import load_all, run, with_tokenizer, write_recipe

SMOOTH = "  v: [{quantize: int8, algorithm: {name: smoothquant}}]\n"
AWQ = "  v: [{quantize: int8_weight, algorithm: {name: awq, steps: 4}}]\n"


@pytest.fixture
def biased(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A llama whose linears all have biases, as large as their outputs."""
    return biased_checkpoint(tmp_path, monkeypatch, "llama")


def biased_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> Path:
    """A checkpoint whose linears all have biases as large as their outputs, as far as the family has them."""
    monkeypatch.setitem(CONFIGS, "biased", {**CONFIGS[family], "mlp_bias": True, "attention_bias": True})
    directory = with_tokenizer(make_checkpoint(tmp_path / "biased", "biased"))
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            tensor.normal_(0, 0.5)
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


@torch.inference_mode()
def logits(directory: Path, ids: Tensor) -> Tensor:
    return load(directory, dtype=torch.float32)(input_ids=ids).logits


@pytest.mark.slow
@pytest.mark.parametrize("variant", [SMOOTH, AWQ], ids=["smoothquant", "awq"])
def test_biases_are_folded_with_their_weights(variant: str, biased: Path, tmp_path: Path) -> None:
    artifact = run(write_recipe(tmp_path, biased, variant), tmp_path / "out").artifact("v")
    name = "model.layers.1.mlp.up_proj.bias"
    before, after = (load_all(directory)[name] for directory in (biased, artifact))
    assert not torch.equal(before, after)
    ids = torch.randint(2, 384, (4, 32), generator=torch.Generator().manual_seed(0))
    source, found = logits(biased, ids), logits(artifact, ids)
    assert (found - source).norm() / source.norm() < 0.02  # 8 bits; 0.3 with the biases of up_proj left as they are


@pytest.mark.slow
@pytest.mark.parametrize("variant", [SMOOTH, AWQ], ids=["smoothquant", "awq"])
def test_biases_of_shared_experts_are_folded(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = biased_checkpoint(tmp_path, monkeypatch, "deepseek_v2")
    artifact = run(write_recipe(tmp_path, directory, variant), tmp_path / "out").artifact("v")
    for name in ("model.layers.0.mlp.up_proj.bias", "model.layers.1.mlp.shared_experts.up_proj.bias"):
        before, after = (load_all(one)[name] for one in (directory, artifact))
        assert not torch.equal(before, after)
    ids = torch.randint(2, 384, (4, 32), generator=torch.Generator().manual_seed(0))
    source, found = logits(directory, ids), logits(artifact, ids)
    assert (found - source).norm() / source.norm() < 0.05


@pytest.mark.slow
@torch.inference_mode()
def test_a_model_with_biases_everywhere_decodes_as_in_transformers(biased: Path) -> None:
    ids = torch.randint(2, 384, (1, 8), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(biased, dtype=torch.float32)(input_ids=ids).logits[0]
    decoder = Decoder(load(biased, dtype=torch.float32), batch=1, length=8)
    decoder.prefill(ids[:, :4])
    found = torch.cat([decoder.step(ids[:, index]).clone() for index in range(4, 8)])
    torch.testing.assert_close(found, expected[4:], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("forgotten", ["divided_rows", "scaled_columns"])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_a_fold_that_forgets_a_tensor_is_caught(
    family: str, forgotten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(edits, forgotten)
    seen: list[Tensor] = []

    def wrong(weight: Tensor, **options: object) -> Tensor:
        """Forget the first tensor."""
        seen.append(weight)
        return weight.float() if len(seen) == 1 else right(weight, **options)

    monkeypatch.setattr(edits, forgotten, wrong)
    recipe = write_recipe(tmp_path, with_tokenizer(make_checkpoint(tmp_path / "model", family)), SMOOTH)
    with pytest.raises(CheckpointError, match="changed what it computes") as caught:
        run(recipe, tmp_path / "out")
    assert "layer 0" in str(caught.value)
    assert not (tmp_path / "out/artifacts/v/config.json").exists()


def test_a_producer_with_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    model = with_tokenizer(make_checkpoint(tmp_path / "model", "llama"))
    path = model / "model.safetensors"
    name = "model.layers.1.post_attention_layernorm.bias"
    save_file({**load_file(path), name: torch.zeros(128)}, path, metadata={"format": "pt"})
    with pytest.raises(PlanError, match="unknown tensor") as caught:
        run(write_recipe(tmp_path, model, AWQ), tmp_path / "out")
    assert name in str(caught.value)
