"""The command line end to end, as users and scripts call it, on a tiny model."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.evaluation.conftest import TINY_SUITE, write_corpus, write_tokenizer
from tests.runtime.foreign import gptq_description, gptq_parts, quantized
from tests.runtime.tiny import write_checkpoint

SHAPE = json.dumps(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
    }
)


def quantlab(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quantlab", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"})


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    write_tokenizer(make_checkpoint(root / "model", "deepseek_v3"))
    suite = root / "tiny.yaml"
    suite.write_text(TINY_SUITE.format(corpus=write_corpus(root / "heldout.jsonl"), shape=SHAPE))
    path = root / "recipe.yaml"
    path.write_text(
        "model: model\nvariants:\n  w4a16: [{quantize: int4_g128}]\n  int8: [{quantize: int8}]\nevaluate: {suite: tiny.yaml}\n"
    )
    return path


@pytest.fixture(scope="module")
def out(recipe: Path) -> Path:
    directory = recipe.parent / "out"
    done = quantlab("run", recipe, "--out", directory)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("source", "w4a16", "int8", "quality", "memory", "speed"))
    assert "2 artifacts made" in done.stderr
    return directory


@pytest.mark.slow
def test_run_leaves_artifacts_records_and_the_matrix(out: Path) -> None:
    assert {path.name for path in (out / "artifacts").iterdir()} == {"w4a16", "int8"}
    matrix = json.loads((out / "matrix.json").read_text())
    assert [row["variant"] for row in matrix["rows"]] == ["source", "w4a16", "int8"]
    for row in matrix["rows"][1:]:
        assert not row["failures"]
        for field in ("perplexity", "perplexity_change_percent", "kl_to_baseline"):
            assert set(row[field]) == {"value", "low", "high", "n"}
            assert row[field]["low"] <= row[field]["high"]
        assert row["speed_over_fp16"]["reason"] == "2 processes", "too few for an interval"
        assert row["quantized_weights_percent_of_fp16"] < 52
    assert (out / "matrix.html").read_text().startswith("<!")
    with (out / "matrix.csv").open(newline="") as file:
        assert [row["variant"] for row in csv.DictReader(file)] == ["source", "w4a16", "int8"]


@pytest.mark.slow
def test_a_second_run_keeps_everything(out: Path, recipe: Path) -> None:
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and ".baseline" not in path.parts}
    done = quantlab("run", recipe, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((out / "matrix.json").read_text())
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_report_builds_the_same_files_from_records_alone(out: Path) -> None:
    names = ("matrix.json", "matrix.csv", "matrix.md", "matrix.html")
    before = {name: (out / name).read_bytes() for name in names}
    for name in names:
        (out / name).unlink()
    assert quantlab("report", out).returncode == 0
    assert {name: (out / name).read_bytes() for name in names} == before


@pytest.mark.slow
def test_eval_needs_artifacts_and_a_suite(recipe: Path, tmp_path: Path) -> None:
    missing = quantlab("eval", recipe, "--out", tmp_path / "nothing")
    assert missing.returncode == 1
    assert "an artifact is missing" in missing.stderr
    silent = tmp_path / "silent.yaml"
    silent.write_text(f"model: {recipe.parent / 'model'}\nvariants: {{a: [{{cast: float16}}]}}\n")
    refused = quantlab("eval", silent)
    assert refused.returncode == 1
    assert "does not say what to measure" in refused.stderr


@pytest.mark.slow
def test_a_mistake_in_the_suite_is_told_before_the_work(recipe: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text((recipe.parent / "tiny.yaml").read_text().replace("length:", "lenght:"))
    wrong = tmp_path / "recipe.yaml"
    wrong.write_text(
        recipe.read_text()
        .replace("model: model", f"model: {recipe.parent / 'model'}")
        .replace("tiny.yaml", "broken.yaml")
    )
    refused = quantlab("run", wrong, "--out", tmp_path / "out")
    assert refused.returncode == 1
    assert "did you mean `length`" in refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("inspect",), ("inspect", "--json")])
def test_inspect(arguments: tuple[str, ...], recipe: Path) -> None:
    done = quantlab(*arguments, recipe.parent / "model")
    assert done.returncode == 0
    assert "DeepseekV3ForCausalLM" in done.stdout
    if "--json" in arguments:
        roles = {tensor["role"] for tensor in json.loads(done.stdout)["tensors"]}
        assert {"routed_experts", "mtp", "router", "kv_b"} <= roles


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("inspect",), ("inspect", "--json")])
def test_inspect_of_artifacts_and_foreign_checkpoints(arguments: tuple[str, ...], out: Path, tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain", "deepseek_v2")
    gptq = quantized(plain, tmp_path / "gptq", gptq_parts(8), gptq_description(8, 32), numbers=lambda name: (8, 32))
    for directory, method, scheme in (
        (out / "artifacts" / "w4a16", "compressed-tensors", "int4_g128"),
        (gptq.directory, "gptq", "int8_weight_g32"),
    ):
        done = quantlab(*arguments, directory)
        assert done.returncode == 0, done.stderr
        assert method in done.stdout
        assert scheme in done.stdout
        if "--json" in arguments:
            tensors = json.loads(done.stdout)["tensors"]
            numbers = {tensor["role"]: tensor["numbers"] for tensor in tensors}
            assert numbers["routed_experts"] == scheme
            assert numbers["router"] in {"BF16", "F32"}, "as transformers wrote it: in float32 from 5.24 on"
            stored = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
            assert 0.9 * stored <= sum(tensor["nbytes"] for tensor in tensors) <= stored


@pytest.mark.slow
def test_plan_prints_a_ledger_and_names_a_wrong_variant(recipe: Path) -> None:
    ledger = quantlab("plan", recipe, "--ledger", "w4a16")
    assert "model.layers.1.mlp.gate.weight" in ledger.stdout
    wrong = quantlab("plan", recipe, "--ledger", "w4a61")
    assert wrong.returncode == 1
    assert "did you mean `w4a16`" in wrong.stderr


@pytest.mark.slow
def test_verify_and_its_exit_code(out: Path) -> None:
    good = quantlab("verify", out / "artifacts" / "w4a16", "--json")
    assert good.returncode == 0, good.stdout
    assert [check["verdict"] for check in json.loads(good.stdout)] == ["ok"] * 5
