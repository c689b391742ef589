"""Calibrated variants on tiny checkpoints: every algorithm in every family, interrupted, spilled, folded and cut short."""

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor

from quantlab.architectures.detect import detect
from quantlab.checkpoint.index import open_checkpoint
from quantlab.errors import CalibrationError, PlanError
from quantlab.evaluation.verify import verify
from quantlab.passes.fold import divided_rows, scaled_columns
from quantlab.plan.compile import compile_plan
from quantlab.plan.folds import folds_of
from quantlab.preflight import check_before_running
from quantlab.recipe.load import load_recipe
from quantlab.run.directory import RunDirectory
from quantlab.run.execute import make_artifacts
from quantlab.texts.locate import Commits
from tests.calibration.oracle import dense_weights, load_model, tokens, write_dense
from tests.checkpoints import CONFIGS, make_checkpoint

ALGORITHMS = """\
  gptq: [{quantize: int4_g128, algorithm: {name: gptq}}]
  clip: [{quantize: int4_g64, algorithm: {name: rtn, clip: activations}}]
  awq: [{quantize: int4_g128, algorithm: {name: awq, steps: 4}}]
  smooth: [{quantize: int8, algorithm: {name: smoothquant}}]
  wanda: [{cast: float16}, {prune: 0.3, algorithm: {name: wanda}}]
  sparse: [{prune: 2:4, algorithm: {name: sparsegpt}}]
  joint: [{prune: 0.5, algorithm: {name: sparsegpt}}, {quantize: int4_g128, algorithm: {name: gptq}}]
  asym: [{quantize: int4_g32_asym, algorithm: {name: gptq}}]
  asym-awq: [{quantize: int4_g32_asym, algorithm: {name: awq, steps: 4}}]
"""
FAMILIES = list(CONFIGS)


def with_tokenizer(directory: Path) -> Path:
    """Words w2 … w383 for the tiny vocabulary."""
    tokenizer = Tokenizer(WordLevel({"<unk>": 0} | {f"w{n}": n for n in range(1, 384)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: with_tokenizer(make_checkpoint(root / family, family)) for family in FAMILIES}


def write_corpus(path: Path, *, documents: int = 16) -> Path:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(1, 384, (documents, 70), generator=generator).tolist()
    path.write_text("".join(json.dumps({"text": " ".join(f"w{n}" for n in row)}) + "\n" for row in words))
    return path


def write_recipe(directory: Path, model: Path, variants: str, *, calibration: str = "") -> Path:
    corpus = write_corpus(directory / "text.jsonl")
    path = directory / "recipe.yaml"
    path.write_text(
        f"model: {model}\ncalibration: {{corpus: {corpus}, samples: 16, length: 32{calibration}}}\nvariants:\n{variants}"
    )
    return path


def run(recipe: Path, out: Path) -> RunDirectory:
    loaded = load_recipe(recipe)
    source = open_checkpoint(loaded.model)
    plan = compile_plan(loaded.recipe, source, corpus_sha256=loaded.corpus_sha256())
    check_before_running(loaded, plan, out, Commits(out), progress=lambda *_: None, time_limit=100)
    directory = RunDirectory(out)
    make_artifacts(plan, loaded, directory, lambda _: lambda _: None)
    return directory


def hashes(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def manifest(artifact: Path) -> dict:
    return json.loads((artifact / "manifest.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_algorithm_makes_an_artifact_that_verifies(family: str, models: dict[str, Path], tmp_path: Path) -> None:
    directory = run(write_recipe(tmp_path, models[family], ALGORITHMS), tmp_path / "out")
    for line in ALGORITHMS.splitlines():
        artifact = directory.artifact(line.split(":")[0].strip())
        checks = list(verify(artifact))
        assert [check for check in checks if check.verdict == "failed"] == [], artifact.name
        ledger = {entry["tensor"]: entry for entry in manifest(artifact)["ledger"]}
        name = (
            "model.layers.2.mlp.experts.3.up_proj.weight"
            if "deepseek" in family
            else "model.layers.2.mlp.up_proj.weight"
        )
        assert artifact.name == "smooth" or ledger[name]["tokens"] > 0
        assert "## Calibration" in (artifact / "README.md").read_text()
        if "deepseek" in family:
            per_expert = manifest(artifact)["tokens_per_expert"]
            assert {sum(counts) for counts in per_expert.values()} == {16 * 32 * 2}
    joint = load_all(directory.artifact("joint"))
    sparse = load_all(directory.artifact("sparse"))
    assert any(name.endswith("weight_packed") for name in joint)
    weight = sparse["model.layers.1.self_attn.o_proj.weight"]
    assert (weight.unflatten(1, (-1, 4)) == 0).sum(dim=2).eq(2).all()
    gptq = [entry for entry in manifest(directory.artifact("gptq"))["ledger"] if "rtn_output_error" in entry]
    assert gptq
    assert sum(entry["output_error"] for entry in gptq) < sum(entry["rtn_output_error"] for entry in gptq)


def load_all(artifact: Path) -> dict[str, Tensor]:
    return {name: tensor for path in artifact.glob("*.safetensors") for name, tensor in load_file(path).items()}


DRIVER = """
import os, signal, sys
import quantlab.run.journal as journal, quantlab.run.calibrated as calibrated
owner, name = {"commit": (journal.Journal, "commit"), "save": (calibrated, "save_streams"),
               "forget": (calibrated, "discard_streams")}[sys.argv[1]]
function, number, calls = getattr(owner, name), int(sys.argv[2]), 0
def killing(*args, **kwargs):
    global calls
    calls += 1
    if calls == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **kwargs)
setattr(owner, name, killing)
sys.argv = ["quantlab", *sys.argv[3:]]
from quantlab.cli import main
main()
"""


GPTQ, AWQ = (ALGORITHMS.splitlines()[line] + "\n" for line in (0, 2))
REAP = "  fewer: [{prune: 0.25, algorithm: {name: reap}}, {quantize: int4_g128, algorithm: {name: gptq}}]\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "number", "variants", "calibration"),
    [
        ("commit", 3, GPTQ, ""),
        ("save", 2, GPTQ, ""),
        ("forget", 2, GPTQ, ""),
        ("forget", 3, GPTQ, ""),
        ("commit", 3, AWQ, ""),
        ("commit", 3, REAP, ""),
        ("commit", 3, GPTQ, ", propagate: original"),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    target: str, number: int, variants: str, calibration: str, models: dict[str, Path], tmp_path: Path
) -> None:
    family = "deepseek_v2" if variants == REAP else "deepseek_v3"  # V3's router needs two experts of each tiny group
    recipe = write_recipe(tmp_path, models[family], variants, calibration=calibration)
    arguments = ["run", str(recipe), "--quiet", "--out"]
    plain = "from quantlab.cli import main; main()"
    subprocess.run([sys.executable, "-c", plain, *arguments, str(tmp_path / "whole")], check=True)
    interrupted = [*arguments, str(tmp_path / "out")]
    killed = subprocess.run([sys.executable, "-c", DRIVER, target, str(number), *interrupted], check=False)
    assert killed.returncode == -signal.SIGKILL
    subprocess.run([sys.executable, "-c", plain, *interrupted], check=True)
    assert hashes(tmp_path / "out" / "artifacts") == hashes(tmp_path / "whole" / "artifacts")
    assert not (tmp_path / "out" / ".work").exists()


@pytest.mark.slow
def test_a_small_memory_changes_no_number(models: dict[str, Path], tmp_path: Path) -> None:
    results = []
    for number, memory in enumerate((", memory: 1 GB", ", memory: 1 KB")):
        root = tmp_path / str(number)
        root.mkdir()
        directory = run(
            write_recipe(root, models["deepseek_v3"], ALGORITHMS.splitlines()[0] + "\n", calibration=memory),
            root / "out",
        )
        results.append(load_all(directory.artifact("gptq")))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_statistics_of_the_original_differ_from_those_of_the_changed_model(
    models: dict[str, Path], tmp_path: Path
) -> None:
    packed = {}
    for word in ("quantized", "original"):
        root = tmp_path / word
        root.mkdir()
        variants = "  gptq: [{quantize: int4_g128, algorithm: {name: gptq}}]\n"
        directory = run(write_recipe(root, models["llama"], variants, calibration=f", propagate: {word}"), root / "out")
        packed[word] = load_all(directory.artifact("gptq"))
    first, last = (f"model.layers.{layer}.self_attn.q_proj.weight_packed" for layer in (0, 2))
    assert torch.equal(packed["quantized"][first], packed["original"][first])
    assert not torch.equal(packed["quantized"][last], packed["original"][last])


@pytest.mark.parametrize("family", FAMILIES)
def test_folds_leave_the_logits_as_they_are(family: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Random factors in every fold of a float32 model, applied to the producers and consumers of the plan."""
    recipe = load_recipe(write_recipe(tmp_path, models[family], ALGORITHMS.splitlines()[2] + "\n"))
    source = open_checkpoint(models[family])
    plan = compile_plan(recipe.recipe, source)
    weights, architecture = dense_weights(models[family]), detect(source.config)
    folds = [
        fold for block in plan.variants[0].blocks for fold in folds_of(s for shard in block.shards for s in shard.steps)
    ]
    generator = torch.Generator().manual_seed(3)
    for fold in folds:
        channels = fold.consumers[0].source.shape[1]
        rows = architecture.fed_rows(fold.producers[0].tensor, source.config, channels=channels)
        factors = torch.empty(max(rows) + 1).uniform_(0.3, 3, generator=generator)[torch.tensor(rows)]
        for step in fold.consumers:
            weights[step.tensor.name] = scaled_columns(weights[step.tensor.name], factors)
        for step in fold.producers:
            weights[step.tensor.name] = divided_rows(weights[step.tensor.name], factors, rows)
    routed = [fold for fold in folds if any(step.tensor.role == "router" for step in fold.consumers)]
    assert len(routed) == (2 if "deepseek" in family else 0), "every router reads what a fold scales"
    sites = {fold.site for fold in folds}
    assert sites == {"attention", "o", "mlp", "down"} | ({"q_latent"} if family == "deepseek_v3" else set())
    plain, changed = write_dense(models[family], tmp_path / "plain"), write_dense(models[family], tmp_path / "changed")

    def logits() -> Tensor:
        contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(contiguous, changed / "model.safetensors", metadata={"format": "pt"})
        with torch.no_grad():
            return load_model(changed)(tokens()).logits

    with torch.no_grad():
        before = load_model(plain)(tokens()).logits
    assert ((logits() - before).norm() / before.norm()).item() <= 1e-5
    if routed:  # without scaling the router, as in AutoAWQ for DeepSeek, the comparison fails
        unscaled = dense_weights(models[family])
        for step in (step for fold in routed for step in fold.consumers if step.tensor.role == "router"):
            weights[step.tensor.name] = unscaled[step.tensor.name]
        assert ((logits() - before).norm() / before.norm()).item() >= 1e-2


def never_routed(models: dict[str, Path], directory: Path) -> tuple[dict, list[int]]:
    """Write a DeepSeek-V3 whose router never picks one expert of each group; return its config and those experts."""
    write_dense(models["deepseek_v3"], directory, num_nextn_predict_layers=0, n_group=2, topk_group=1)
    with_tokenizer(directory)
    path = directory / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("model.layers.3.")}
    config = json.loads((directory / "config.json").read_text())
    each = config["n_routed_experts"] // config["n_group"]
    unwanted = [group * each + 1 for group in range(config["n_group"])]
    for name, tensor in weights.items():
        if name.endswith("e_score_correction_bias"):
            tensor.zero_()
            tensor[unwanted] = -100.0
    save_file(weights, path, metadata={"format": "pt"})
    return config, unwanted


def test_an_expert_without_tokens_is_told(models: dict[str, Path], tmp_path: Path) -> None:
    _, unwanted = never_routed(models, tmp_path / "model")
    recipe = write_recipe(tmp_path, tmp_path / "model", ALGORITHMS.splitlines()[0] + "\n")
    artifact = run(recipe, tmp_path / "out").artifact("gptq")
    told = {
        entry["tensor"]
        for entry in manifest(artifact)["ledger"]
        if entry.get("fallback", "").startswith("no calibration token reached it")
    }
    assert told == {
        f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight"
        for layer in (1, 2)
        for expert in unwanted
        for kind in ("gate", "up", "down")
    }
    assert "12 matrices: no calibration token reached it" in (artifact / "README.md").read_text()


def test_smoothquant_reports_unsmoothed_channels(models: dict[str, Path], tmp_path: Path) -> None:
    """Channels shared by experts, and channels of experts without tokens, are not smoothed."""
    _, unwanted = never_routed(models, tmp_path / "model")
    recipe = write_recipe(tmp_path, tmp_path / "model", ALGORITHMS.splitlines()[3] + "\n")
    loaded = load_recipe(recipe)
    plan = compile_plan(loaded.recipe, open_checkpoint(tmp_path / "model"))
    assert any("rounds 36 expert matrices" in note for note in plan.variants[0].notes)
    artifact = run(recipe, tmp_path / "out").artifact("smooth")
    told = {entry["tensor"]: entry["fallback"] for entry in manifest(artifact)["ledger"] if "fallback" in entry}
    prefix = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
    unscaled = {prefix.format(layer, expert, "down") for layer in (1, 2) for expert in unwanted}
    assert {name for name, what in told.items() if what.startswith("not scaled: no calibration token")} == unscaled
    shared = {name for name, what in told.items() if what == "not smoothed: experts share the norm before them"}
    experts = {prefix.format(layer, expert, kind) for layer in (1, 2) for expert in range(8) for kind in ("gate", "up")}
    together = {
        f"model.layers.{layer}.mlp.shared_experts.{kind}_proj.weight" for layer in (1, 2) for kind in ("gate", "up")
    }
    assert shared == experts | together
    assert "36 matrices: not smoothed" in (artifact / "README.md").read_text()


def test_two_algorithms_on_the_same_channels_are_an_error_of_the_plan(models: dict[str, Path], tmp_path: Path) -> None:
    variants = (
        "  v: [{quantize: int8, targets: [routed_experts], algorithm: {name: awq}}, "
        "{quantize: int8, targets: [shared_experts], algorithm: {name: smoothquant}}]\n"
    )
    recipe = load_recipe(write_recipe(tmp_path, models["deepseek_v3"], variants))
    with pytest.raises(PlanError, match="two algorithms scale the same channels") as caught:
        compile_plan(recipe.recipe, open_checkpoint(models["deepseek_v3"]))
    assert "post_attention_layernorm.weight" in str(caught.value)
    assert "give routed_experts and shared_experts the same algorithm" in str(caught.value)


def test_removed_scaled_and_compared_experts_are_an_error_of_the_plan(models: dict[str, Path], tmp_path: Path) -> None:
    passes = (
        "[{prune: 0.25, algorithm: {name: reap}}, {quantize: int4_g128, targets: [shared_experts], algorithm: {name: awq}}, "
        "{quantize: int4_g128, targets: [routed_experts], algorithm: {name: gptq}}]"
    )
    source = open_checkpoint(models["deepseek_v2"])
    recipe = load_recipe(write_recipe(tmp_path, models["deepseek_v2"], f"  v: {passes}\n"))
    with pytest.raises(PlanError, match="remove experts, scale them and compare") as caught:
        compile_plan(recipe.recipe, source)
    assert "awq scales the channels of experts, and routed_experts have a `correction`" in str(caught.value)
    without = passes.replace("{name: gptq}", "{name: gptq, correction: 0}")
    for allowed, calibration in ((without, ""), (passes, ", propagate: original")):
        path = write_recipe(tmp_path, models["deepseek_v2"], f"  v: {allowed}\n", calibration=calibration)
        compile_plan(load_recipe(path).recipe, source)


def test_removed_experts_are_those_no_token_needs(models: dict[str, Path], tmp_path: Path) -> None:
    """Experts that the router never picks are removed, and the model computes the same without them."""
    model = tmp_path / "model"
    config, unwanted = never_routed(models, model)
    each = config["n_routed_experts"] // config["n_group"]
    variants = f"  fewer: [{{prune: {1 / each:.4f}, algorithm: {{name: reap}}}}]\n"
    artifact = run(write_recipe(tmp_path, model, variants), tmp_path / "out").artifact("fewer")
    kept = [expert for expert in range(config["n_routed_experts"]) if expert not in unwanted]
    assert set(map(tuple, manifest(artifact)["kept_experts"].values())) == {tuple(kept)}
    assert json.loads((artifact / "config.json").read_text())["n_routed_experts"] == len(kept)
    assert [check for check in verify(artifact) if check.verdict == "failed"] == []
    with torch.no_grad():
        before, after = (load_model(directory)(tokens()).logits for directory in (model, artifact))
    assert ((after - before).norm() / before.norm()).item() <= 1e-5


def test_too_few_experts_for_the_router_is_an_error_of_the_plan(models: dict[str, Path], tmp_path: Path) -> None:
    for ratio, what in (
        ("0.9", "the router would pick more experts than stay"),
        ("0.01", "no expert would be removed"),
    ):
        recipe = load_recipe(
            write_recipe(tmp_path, models["deepseek_v3"], f"  v: [{{prune: {ratio}, algorithm: {{name: reap}}}}]\n")
        )
        with pytest.raises(PlanError, match=what):
            compile_plan(recipe.recipe, open_checkpoint(models["deepseek_v3"]))


def test_a_pattern_that_does_not_divide_is_an_error_of_the_plan(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, models["llama"], "  v: [{prune: 3:7, algorithm: {name: wanda}}]\n"))
    with pytest.raises(PlanError, match="the pattern does not divide"):
        compile_plan(recipe.recipe, open_checkpoint(models["llama"]))


def test_text_that_is_too_short_leaves_nothing_behind(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, models["llama"], ALGORITHMS.splitlines()[0] + "\n", calibration=", seed: 1")
    recipe.write_text(recipe.read_text().replace("samples: 16", "samples: 5000"))
    with pytest.raises(CalibrationError, match="too short"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
