"""Peers of a recipe: what another tool wrote is checked from its headers, and named by what its files say."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantlab.errors import ArtifactError, CheckpointError, PlanError, QuantlabError, RecipeError
from quantlab.exports.export import export
from quantlab.plan.compile import compile_plan
from quantlab.plan.model import Peer
from quantlab.recipe.load import load_recipe
from quantlab.source import open_peers, open_source
from tests.checkpoints import make_checkpoint
from tests.exports.artifacts import make_artifact

RECIPE = "model: {model}\nvariants: {{int8: [{{quantize: int8}}]}}\npeers: {{other: {peer}}}\nevaluate: {{suite: none.yaml}}\n"


@pytest.fixture(scope="module")
def written(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as GPTQModel would leave it."""
    root = tmp_path_factory.mktemp("peers")
    artifact = make_artifact(checkpoints["llama"], "[{quantize: int4_g64}]", root)
    export(artifact, "gptq", root / "gptq", lambda _: None)
    edit(root / "gptq", lambda config: config["quantization_config"].update(meta={"quantizer": ["gptqmodel:7.3.4"]}))
    return root / "gptq"


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def planned(model: Path, peer: Path, root: Path) -> Peer:
    (root / "recipe.yaml").write_text(RECIPE.format(model=model, peer=peer))
    loaded = load_recipe(root / "recipe.yaml")
    (found,) = compile_plan(loaded.recipe, open_source(loaded), peers=open_peers(loaded)).peers
    return found


def test_a_peer_is_named_by_its_files(checkpoints: dict[str, Path], written: Path, tmp_path: Path) -> None:
    peer = planned(checkpoints["llama"], written, tmp_path)
    assert (peer.name, peer.method, peer.producer) == ("other", "gptq", "gptqmodel 7.3.4")
    assert peer.description == "another tool's int4_g64, as gptq; by gptqmodel 7.3.4"
    plain = planned(checkpoints["llama"], checkpoints["llama"], tmp_path)
    assert plain.description == "another tool's BF16, not quantized; by a program that its files do not name"


@pytest.mark.parametrize(
    ("described", "producer"),
    [
        ({"quant_method": "compressed-tensors", "version": "0.20.1", "config_groups": {}}, "compressed-tensors 0.20.1"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64, "autoround_version": "0.9"}, "auto-round 0.9"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64, "meta": {"quantizer": []}}, ""),
    ],
)
def test_other_tools_name_themselves_in_other_fields(
    described: dict[str, Any], producer: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(checkpoints["llama"], tmp_path / "copy")
    edit(copy, lambda config: config.update(quantization_config=described))
    assert planned(checkpoints["llama"], copy, tmp_path).producer == producer
    (copy / "manifest.json").write_text(json.dumps({"versions": {"quantlab": "9.9"}}))
    assert planned(checkpoints["llama"], copy, tmp_path).producer == "quantlab 9.9"


def test_fewer_experts_and_no_prediction_layer_are_the_same_model(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    make_checkpoint(wide, "deepseek_v3", sizes={"n_routed_experts": 16})
    peer = planned(wide, checkpoints["deepseek_v3"], tmp_path)  # 8 experts
    assert peer.method == "fp8"
    with pytest.raises(PlanError, match="another model"):
        planned(checkpoints["deepseek_v3"], wide, tmp_path)


REFUSED: dict[str, tuple[type[QuantlabError], str, Callable[[dict[str, Any]], object]]] = {
    "another width": (
        PlanError, "hidden 64, the recipe's model has 128", lambda config: config.update(hidden_size=64, head_dim=32),
    ),
    "another family": (PlanError, "model_type qwen2", lambda config: config.update(model_type="qwen2", architectures=["Qwen2ForCausalLM"])),
    "another method": (
        CheckpointError, "awq", lambda config: config["quantization_config"].update(quant_method="awq"),
    ),
    "other numbers": (ArtifactError, "3 bits in groups of 64", lambda config: config["quantization_config"].update(bits=3)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused_by_the_plan(
    case: str, checkpoints: dict[str, Path], written: Path, tmp_path: Path
) -> None:
    kind, found, change = REFUSED[case]
    copy = shutil.copytree(written, tmp_path / "copy")
    edit(copy, change)
    with pytest.raises(kind) as caught:
        planned(checkpoints["llama"], copy, tmp_path)
    assert found in (caught.value.found or "")
    assert str(copy) in (caught.value.where or "")
    assert caught.value.fix


def test_a_missing_tensor_is_found_in_the_headers(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(checkpoints["llama"], tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    taken = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match="a tensor of the peer other is missing"):
        planned(checkpoints["llama"], copy, tmp_path)
    tensors["model.layers.1.mlp.up_proj.weight"] = taken[:-1].contiguous()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match="has another shape"):
        planned(checkpoints["llama"], copy, tmp_path)


@pytest.mark.parametrize(
    ("peers", "message"),
    [
        ("{int8: a}\nevaluate: {suite: s}", "the peer int8 has the name of another row"),
        ("{source: a}\nevaluate: {suite: s}", "the peer source has the name of another row"),
        ("{a: b}", "peers are only measured"),
        ("{A B: b}\nevaluate: {suite: s}", "peers"),
    ],
)
def test_recipes_with_wrong_peers_are_refused(peers: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"model: m\nvariants: {{int8: [{{quantize: int8}}]}}\npeers: {peers}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert message in str(caught.value)
