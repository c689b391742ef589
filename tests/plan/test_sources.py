"""Sources as transformers and other tools save them: fused experts, no shared experts, incomplete MTP layers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantlab.checkpoint.index import open_checkpoint
from quantlab.errors import CheckpointError, PlanError
from quantlab.evaluation.verify import verify
from quantlab.plan.compile import compile_plan
from quantlab.plan.model import Plan
from quantlab.recipe.load import load_recipe
from quantlab.run.directory import RunDirectory
from quantlab.runtime.load import load
from tests.run.test_calibrated import run, with_tokenizer, write_recipe

MOE = ["deepseek_v2", "deepseek_v3"]
VARIANTS = """\
  int8: [{quantize: int8}]
  gptq: [{quantize: int4_g128, algorithm: {name: gptq}}]
  awq: [{quantize: int4_g128, algorithm: {name: awq, steps: 2}}]
  smooth: [{quantize: int8, algorithm: {name: smoothquant}}]
  reap: [{prune: 0.5, algorithm: {name: reap}}]
"""
FEWER = VARIANTS.replace("prune: 0.5", "prune: 0.25")


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def changed(source: Path, copy: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    """A copy of a checkpoint, in one file, with other tensors and other fields of config.json; None removes a field."""
    shutil.copytree(source, copy)
    for path in (*copy.glob("*.safetensors"), *copy.glob("*.index.json")):
        path.unlink()
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, copy / "model.safetensors", metadata={"format": "pt"}
    )
    config = json.loads((copy / "config.json").read_text()) | fields
    (copy / "config.json").write_text(json.dumps(config))
    return with_tokenizer(copy)


def fused(tensors: dict[str, Tensor], *, experts: int = 8) -> dict[str, Tensor]:
    """The same tensors with the experts of a layer in two, as transformers holds them."""
    rest = {name: t for name, t in tensors.items() if ".mlp.experts." not in name}
    first = [name for name in tensors if ".mlp.experts.0.down_proj." in name]
    for name in first:
        prefix, _, part = name.partition(".experts.0.down_proj.weight")
        of = {
            kind: [tensors[f"{prefix}.experts.{e}.{kind}_proj.weight{part}"] for e in range(experts)]
            for kind in ("gate", "up", "down")
        }
        rest[f"{prefix}.experts.gate_up_proj{part}"] = torch.stack(
            [torch.cat(pair) for pair in zip(of["gate"], of["up"], strict=True)]
        )
        rest[f"{prefix}.experts.down_proj{part}"] = torch.stack(of["down"])
    return rest


def plan(source: Path, tmp_path: Path, variants: str = "  int8: [{quantize: int8}]\n") -> Plan:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {source}\nvariants:\n{variants}")
    return compile_plan(load_recipe(recipe).recipe, open_checkpoint(source))


def assert_verified(directory: RunDirectory, names: list[str]) -> None:
    for name in names:
        checks = list(verify(directory.artifact(name)))
        assert [check for check in checks if check.verdict == "failed"] == [], name


@pytest.mark.parametrize(
    "variant",
    [
        "int8: [{quantize: int8}]",
        pytest.param("gptq: [{quantize: int4_g128, algorithm: {name: gptq}}]", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", MOE)
def test_artifacts_of_fused_experts_are_those_of_single_ones(
    family: str, variant: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    tensors = tensors_of(checkpoints[family])
    single = changed(checkpoints[family], tmp_path / "single", tensors)
    together = changed(checkpoints[family], tmp_path / "fused", fused(tensors))
    assert not any(".experts.0." in name for name in open_checkpoint(together).tensors)
    expected, found = (
        tensors_of(run(write_recipe(tmp_path, source, f"  {variant}\n"), tmp_path / source.name / "out").artifact(name))
        for name in [variant.partition(":")[0]]
        for source in (single, together)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_fused_experts_that_cannot_be_divided_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tensors = fused(tensors_of(checkpoints["deepseek_v2"]))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    for number, shape in enumerate(((8, 255, 128), (2048, 128))):
        other = tensors | {name: torch.zeros(shape, dtype=torch.bfloat16)}
        source = changed(checkpoints["deepseek_v2"], tmp_path / str(number), other)
        for attempt in (lambda source=source: plan(source, tmp_path), lambda source=source: load(source)):
            with pytest.raises(CheckpointError, match="cannot be divided") as caught:
                attempt()
            assert name in (caught.value.where or "")
    transposed = tensors | {name: tensors[name].transpose(1, 2)}
    with pytest.raises(CheckpointError, match="wrong shape"):
        plan(changed(checkpoints["deepseek_v2"], tmp_path / "transposed", transposed), tmp_path)


def test_blocks_over_gate_and_up_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """With blocks of 256 rows one block would have the 128 rows of gate and the 128 of up."""
    source = changed(checkpoints["deepseek_v3"], tmp_path / "c", fused(tensors_of(checkpoints["deepseek_v3"])))
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [256, 128]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="cannot be divided") as caught:
        plan(source, tmp_path)
    assert "blocks of 256 rows" in (caught.value.found or "")


def without_shared(tensors: dict[str, Tensor], *, empty: bool) -> dict[str, Tensor]:
    """The tensors of a model without shared experts; `empty`: with matrices of no elements, as transformers saves them."""
    result = {}
    for name, tensor in tensors.items():
        if ".shared_experts." not in name:
            result[name] = tensor
        elif empty and name.endswith(".weight"):
            shape = (128, 0) if ".down_proj." in name else (0, 128)
            result[name] = torch.empty(shape, dtype=torch.bfloat16)
    return result


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("count", [0, None])
@pytest.mark.parametrize("family", MOE)
def test_models_without_shared_experts(
    family: str, count: int | None, empty: bool, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    tensors = without_shared(tensors_of(checkpoints[family]), empty=empty)
    source = changed(checkpoints[family], tmp_path / "c", tensors, n_shared_experts=count)
    compiled = plan(source, tmp_path)
    outcomes = {step.tensor.name: step for step in compiled.variants[0].steps if ".shared_experts." in step.tensor.name}
    assert bool(outcomes) == empty
    assert {(step.outcome, step.reason) for step in outcomes.values()} <= {("kept", "it has no elements")}
    ids = torch.arange(32)[None]
    config = json.loads((source / "config.json").read_text())
    if "quantization_config" not in config:  # transformers misreads FP8 blocks
        reference = shutil.copytree(source, tmp_path / "reference")
        (reference / "config.json").write_text(json.dumps(config | {"n_shared_experts": 0}))
        theirs = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
        with torch.inference_mode():
            found, expected = load(source, dtype=torch.float32)(ids).logits, theirs(ids).logits
        assert (found - expected).norm() / expected.norm() < 1e-5
    else:
        with torch.inference_mode():
            assert load(source)(ids).logits.isfinite().all()
    artifact = run(write_recipe(tmp_path, source, "  int8: [{quantize: int8}]\n"), tmp_path / "out").artifact("int8")
    stored = {name: t for name, t in tensors_of(artifact).items() if ".shared_experts." in name}
    assert set(stored) == set(outcomes)
    assert not any(t.numel() for t in stored.values())
    with torch.inference_mode():
        assert load(artifact)(ids).logits.isfinite().all()
    with pytest.raises(PlanError, match="a target matches nothing"):
        plan(source, tmp_path, "  v: [{quantize: int8, targets: [shared_experts]}]\n")


@pytest.mark.slow
@pytest.mark.parametrize("empty", [False, True])
def test_every_algorithm_without_shared_experts(empty: bool, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tensors = without_shared(tensors_of(checkpoints["deepseek_v2"]), empty=empty)
    source = changed(checkpoints["deepseek_v2"], tmp_path / "c", tensors, n_shared_experts=0)
    directory = run(write_recipe(tmp_path, source, FEWER), tmp_path / "out")
    assert_verified(directory, ["int8", "gptq", "awq", "smooth", "reap"])
    names = tensors_of(directory.artifact("gptq"))
    assert any(".shared_experts." in name for name in names) == empty


@pytest.mark.parametrize("count", [0, None])
def test_shared_experts_that_the_config_denies_are_refused(
    count: int | None, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source = changed(
        checkpoints["deepseek_v2"], tmp_path / "c", tensors_of(checkpoints["deepseek_v2"]), n_shared_experts=count
    )
    with pytest.raises(CheckpointError, match="does not have") as caught:
        plan(source, tmp_path)
    assert ".shared_experts." in (caught.value.where or "")


COPIES = ("embed_tokens.weight", "shared_head.head.weight")


@pytest.mark.parametrize("left", [COPIES, COPIES[:1], COPIES[1:], ()])
@pytest.mark.parametrize("word", [1, None, "absent"])
def test_mtp_layers_without_copies_or_without_their_word(
    left: tuple[str, ...], word: int | str | None, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    gone = {f"model.layers.3.{name}" for name in COPIES} - {f"model.layers.3.{name}" for name in left}
    tensors = {name: t for name, t in tensors_of(checkpoints["deepseek_v3"]).items() if name not in gone}
    source = changed(checkpoints["deepseek_v3"], tmp_path / "c", tensors, num_nextn_predict_layers=word)
    if word == "absent":
        config = json.loads((source / "config.json").read_text())
        del config["num_nextn_predict_layers"]
        (source / "config.json").write_text(json.dumps(config))
    steps = list(plan(source, tmp_path).variants[0].steps)
    mtp = {step.tensor.name for step in steps if step.tensor.role == "mtp"}
    assert {f"model.layers.3.{name}" for name in left} | {"model.layers.3.eh_proj.weight"} <= mtp
    assert {step.outcome for step in steps if step.tensor.role == "mtp"} <= {"kept", "cast"}
    directory = run(write_recipe(tmp_path, source, "  int8: [{quantize: int8}]\n"), tmp_path / "out")
    artifact = directory.artifact("int8")
    assert json.loads((artifact / "config.json").read_text())["num_nextn_predict_layers"] == 1
    for model in (load(source), load(artifact)):
        assert len(model.model.layers) == 3


def test_a_part_of_an_mtp_layer_that_is_no_copy_must_be_there(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tensors = tensors_of(checkpoints["deepseek_v3"])
    del tensors["model.layers.3.enorm.weight"]
    source = changed(checkpoints["deepseek_v3"], tmp_path / "c", tensors)
    with pytest.raises(CheckpointError, match="a tensor is missing") as caught:
        plan(source, tmp_path)
    assert caught.value.found == "no model.layers.3.enorm.weight"


def test_layers_past_the_end_that_are_no_mtp_layers_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tensors = tensors_of(checkpoints["deepseek_v3"])
    tensors = {name: t for name, t in tensors.items() if "eh_proj" not in name}
    source = changed(checkpoints["deepseek_v3"], tmp_path / "c", tensors, num_nextn_predict_layers=None)
    with pytest.raises(CheckpointError, match="belongs to a layer or expert"):
        plan(source, tmp_path)
