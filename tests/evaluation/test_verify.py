"""`verify` on intact artifacts and on damaged ones."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from quantlab.checkpoint.index import open_checkpoint
from quantlab.errors import ArtifactError
from quantlab.evaluation.verify import verify
from quantlab.plan.compile import compile_plan
from quantlab.recipe.load import load_recipe
from quantlab.run.directory import RunDirectory
from quantlab.run.execute import make_artifacts

DENSE = """\
  fp16: [{cast: float16}]
  int8: [{quantize: int8}]
  w4a16: [{quantize: int4_g128}]
  asym: [{quantize: int4_g128_asym}]
"""
EXPERTS = """\
  w4a16-experts: [{quantize: int4_g128, targets: [routed_experts]}]
  mixed: [{quantize: int8_weight, targets: [attention]}, {quantize: int4_g128, targets: [routed_experts, shared_experts]}]
  int8-attention: [{quantize: int8, targets: [attention]}, {quantize: int4_g128, targets: [routed_experts]}]
  by-layer: [{quantize: int4_g64, targets: [attention], ignore: ['*.layers.0.*']}, {quantize: int4_g128, targets: [attention], ignore: ['*.layers.1.*', '*.layers.2.*']}]
"""


def make(checkpoint: Path, variants: str, root: Path) -> RunDirectory:
    recipe = root / "recipe.yaml"
    recipe.write_text(f"model: {checkpoint}\nvariants:\n{variants}")
    loaded = load_recipe(recipe)
    directory = RunDirectory(root / "out")
    plan = compile_plan(loaded.recipe, open_checkpoint(checkpoint))
    make_artifacts(plan, loaded, directory, lambda _: lambda _: None)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_our_artifacts_pass_verification(family: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    moe = family.startswith("deepseek")
    directory = make(checkpoints[family], DENSE + (EXPERTS if moe else ""), tmp_path)
    for artifact in sorted((directory.path / "artifacts").iterdir()):
        checks = list(verify(artifact))
        assert len(checks) == 5
        not_applicable = [check.name for check in checks if check.verdict == "not applicable"]
        # rules of transformers: experts with zero points, with quantized activations, or beside quantized linears
        assert len(not_applicable) == (moe and artifact.name in {"int8", "asym", "by-layer"})
        failed = [f"{artifact.name}: {check.name}: {check.detail}" for check in checks if check.verdict == "failed"]
        assert not failed


@pytest.fixture
def artifact(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return make(checkpoints["llama"], "  w4a16: [{quantize: int4_g128}]\n", tmp_path).artifact("w4a16")


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (lambda d: _append(d / "config.json"), "config.json was changed"),
    "missing": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "extra": (
        lambda d: (d / "model-extra.safetensors").write_bytes(b""),
        "model-extra.safetensors is not in the manifest",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(damage: str, artifact: Path) -> None:
    inflict, expected = DAMAGES[damage]
    inflict(artifact)
    checks = list(verify(artifact))
    assert [check.verdict for check in checks] == ["failed"]
    assert expected in checks[0].detail


def test_no_artifact(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a quantlab artifact"):
        list(verify(tmp_path))
    (artifact / "manifest.json").write_text("{}")
    with pytest.raises(ArtifactError, match="the manifest is damaged"):
        list(verify(artifact))
    shutil.rmtree(artifact)
    with pytest.raises(ArtifactError):
        list(verify(artifact))
