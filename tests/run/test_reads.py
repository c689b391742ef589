"""Every tensor of a layer is read and decoded once per variant; a block never holds source and result of a weight."""

from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantlab.checkpoint.index import open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.passes.removal import without_experts
from quantlab.plan.compile import compile_plan
from quantlab.recipe.load import load_recipe
from quantlab.run.weights import BlockWeights
from tests.checkpoints import make_checkpoint
from tests.run.test_calibrated import run, with_tokenizer, write_recipe

VARIANTS = {
    "rtn": "[{quantize: int4_g128}]",
    "gptq": "[{quantize: int4_g128, algorithm: {name: gptq}}]",
    "awq": "[{quantize: int4_g128, algorithm: {name: awq, steps: 2}}]",
    "smooth": "[{quantize: int8, algorithm: {name: smoothquant}}]",
    "wanda": "[{prune: 0.5, algorithm: {name: wanda}}]",
    "reap": "[{prune: 0.25, algorithm: {name: reap}}, {quantize: int4_g128, algorithm: {name: awq, steps: 2}}]",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(make_checkpoint(tmp_path_factory.mktemp("models") / "model", "deepseek_v2"))


@pytest.mark.parametrize("propagate", ["quantized", "original"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_of_a_layer_is_read_once(
    name: str, propagate: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[str] = Counter()
    read = Reader.read

    def counted(reader: Reader, tensor: str) -> Tensor:
        reads[tensor] += 1
        return read(reader, tensor)

    monkeypatch.setattr(Reader, "read", counted)
    run(
        write_recipe(tmp_path, model, f"  v: {VARIANTS[name]}\n", calibration=f", propagate: {propagate}"),
        tmp_path / "o",
    )
    assert set(reads) == set(open_checkpoint(model).tensors)
    assert {tensor for tensor, count in reads.items() if count > 1} <= {"model.embed_tokens.weight"}


def test_a_block_holds_a_source_or_a_result(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    set_result = BlockWeights.set

    def watched(weights: BlockWeights, name: str, *result: object) -> None:
        set_result(weights, name, *result)
        assert not set(weights._sources) & set(weights._results)
        held.append(sum(tensor.nbytes for tensor in weights._sources.values()))

    monkeypatch.setattr(BlockWeights, "set", watched)
    run(write_recipe(tmp_path, model, f"  v: {VARIANTS['gptq']}\n"), tmp_path / "out")
    assert 0 in held
    assert max(held) > 0


def test_a_weight_is_the_source_with_its_edits(tmp_path: Path, model: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, model, f"  v: {VARIANTS['reap']}\n"))
    plan = compile_plan(recipe.recipe, open_checkpoint(model))
    block = next(block for block in plan.variants[0].blocks if block.name == "layer 1")
    prefix = "model.layers.1.mlp."
    numbers = {
        step.tensor.name: float(index) for index, step in enumerate(s for shard in block.shards for s in shard.steps)
    }

    def read(step):
        rows = torch.arange(step.source.shape[0], dtype=torch.bfloat16).view(-1, *[1] * (len(step.source.shape) - 1))
        return rows.expand(step.source.shape) + numbers[step.tensor.name] * 1000

    weights = BlockWeights(block, read)
    for name in weights.steps:
        weights.source(name)
    weights.restructure(partial(without_experts, kept=(1, 2, 4, 5, 6, 7)))
    for number, old in enumerate((1, 2, 4, 5, 6, 7)):
        expected = read(weights.steps[f"{prefix}experts.{old}.up_proj.weight"])
        assert torch.equal(weights.source(f"{prefix}experts.{number}.up_proj.weight"), expected)
    router = weights.source(f"{prefix}gate.weight")
    assert torch.equal(router, read(weights.steps[f"{prefix}gate.weight"])[[1, 2, 4, 5, 6, 7]])
    name = f"{prefix}experts.0.up_proj.weight"
    weights.fold(name, lambda weight: weight.float() * 2)
    weights.fold(name, lambda weight: weight + 1)
    assert torch.equal(weights.source(name), read(weights.steps[f"{prefix}experts.1.up_proj.weight"]).float() * 2 + 1)
    assert weights.stored(name).dtype == torch.bfloat16
