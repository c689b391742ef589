"""Results shared by variants: artifacts equal those without sharing, and the unchanged model is computed only once."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from quantlab.calibration import inputs
from quantlab.calibration.hidden import Workspace
from quantlab.numerics.statistics import SiteStatistics
from quantlab.run import flow, shared
from quantlab.run.directory import RunDirectory
from quantlab.run.shared import SharedStages
from tests.checkpoints import make_checkpoint
from tests.run.test_calibrated import hashes, run, with_tokenizer, write_recipe

VARIANTS = {
    "gptq": "[{quantize: int4_g128, algorithm: {name: gptq}}]",
    "sparse": "[{prune: 0.5, algorithm: {name: sparsegpt}}]",
    "wanda": "[{prune: 0.5, algorithm: {name: wanda}}]",
    "awq": "[{quantize: int4_g128, algorithm: {name: awq, steps: 2}}]",
    "fewer": "[{prune: 0.5, algorithm: {name: reap}}, {quantize: int4_g128, algorithm: {name: gptq}}]",
    "experts": "[{quantize: int4_g128, targets: [routed_experts], algorithm: {name: gptq}}]",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = with_tokenizer(make_checkpoint(tmp_path_factory.mktemp("models") / "model", "deepseek_v3"))
    config = json.loads((directory / "config.json").read_text()) | {"n_group": 1, "topk_group": 1}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def make(root: Path, model: Path, names: list[str], *, propagate: str) -> RunDirectory:
    root.mkdir()
    variants = "".join(f"  {name}: {VARIANTS[name]}\n" for name in names)
    return run(write_recipe(root, model, variants, calibration=f", propagate: {propagate}"), root / "out")


def weights(directory: RunDirectory, name: str) -> dict[str, str]:
    found = hashes(directory.artifact(name))
    return {file: digest for file, digest in found.items() if file.endswith(".safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("propagate", "room", "names"),
    [
        ("original", "plenty", [name for name in VARIANTS if name != "wanda"]),
        ("original", "none", ["wanda", "awq"]),
        ("quantized", "plenty", ["gptq", "experts"]),
        ("quantized", "none", ["experts", "gptq"]),
    ],
)
def test_sharing_changes_no_byte(
    propagate: str, room: str, names: list[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if room == "none":
        monkeypatch.setattr(RunDirectory, "check_space", lambda *_: 0)
    together = make(tmp_path / "together", model, names, propagate=propagate)
    for name in names:
        alone = make(tmp_path / name, model, [name], propagate=propagate)
        assert weights(together, name) == weights(alone, name), name
    assert not (together.path / ".work").exists()


@pytest.mark.slow
def test_the_unchanged_model_runs_once_for_all_that_watch_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    for module, name in ((flow, "advance"), (inputs, "collect"), (inputs, "collect_moe")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _f=original, _n=name, **k: (calls.update([_n]), _f(*a, **k))[1])
    make(tmp_path / "one", model, ["sparse"], propagate="original")
    alone = Counter(calls)
    calls.clear()
    make(tmp_path / "two", model, ["sparse", "gptq", "experts"], propagate="original")
    assert calls == alone
    assert alone["collect_moe"] == 2  # layers with experts


@pytest.mark.slow
def test_the_unchanged_model_beside_the_changed_one_runs_on_from_files(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: Counter[int] = Counter()
    save = SharedStages.save
    monkeypatch.setattr(
        SharedStages, "save", lambda self, layer, hidden: (saved.update([layer]), save(self, layer, hidden))
    )
    make(tmp_path / "two", model, ["gptq", "experts"], propagate="quantized")
    assert saved == Counter({0: 1, 1: 1, 2: 1})


def stream(workspace: Workspace, value: float) -> "shared.HiddenStates":
    hidden = workspace.stream(2, 4, 8, dtype=torch.float32)
    hidden.write(slice(0, 2), torch.full((2, 4, 8), value))
    return hidden


def test_over_the_budget_only_the_last_hidden_states_stay(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, memory_bytes=1 << 20, device=torch.device("cpu"))
    for budget, kept in ((1 << 20, [0, 1, 2]), (0, [2])):
        stages = SharedStages(tmp_path / str(budget), budget=budget)
        for layer in range(3):
            stages.save(layer, stream(workspace, float(layer)))
            stages.tidy()
        assert stages.layers() == kept
        hidden = stream(workspace, -1.0)
        stages.load(2, hidden)
        assert hidden.read(slice(0, 2)).eq(2).all()


def test_statistics_are_looked_up_by_name_and_needs(tmp_path: Path) -> None:
    stages = SharedStages(tmp_path / "shared", budget=1 << 20)
    hessian = torch.eye(3)

    def compute() -> SiteStatistics:
        return SiteStatistics(7, hessian.diagonal(), hessian=hessian)

    def never() -> SiteStatistics:
        raise AssertionError

    stages.statistics("layer 0 o", {"hessian"}, compute)
    found = stages.statistics("layer 0 o", {"hessian"}, never)
    assert found.count == 7
    assert found.hessian is not None
    assert torch.equal(found.hessian, hessian)
    with pytest.raises(AssertionError):
        stages.statistics("layer 0 o", {"squares"}, never)
    full = SharedStages(tmp_path / "full", budget=8)
    full.statistics("layer 0 o", {"hessian"}, compute)
    with pytest.raises(AssertionError):
        full.statistics("layer 0 o", {"hessian"}, never)
