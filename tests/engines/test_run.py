"""Engines of a recipe and of the command line: verdicts reach the artifact, the record, the model card and the matrix."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantlab.evaluation.engines.verdict import read_verdicts
from quantlab.evaluation.record import read_record
from tests.checkpoints import make_checkpoint
from tests.evaluation.conftest import TINY_SUITE, write_corpus, write_tokenizer
from tests.test_command_line import SHAPE


def quantlab(*arguments: str | Path, cache: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quantlab", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "200", "XDG_CACHE_HOME": str(cache), "QUANTLAB_NATIVE": "0"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_list_of_engines(tmp_path: Path) -> None:
    done = quantlab("engines", "--json", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row["engine"]: row for row in json.loads(done.stdout)}
    assert rows["vllm"]["python"] == "not installed"
    refused = quantlab("engines", "install", "sglang", cache=tmp_path)
    assert refused.returncode == 1
    assert "has no build for machines without its accelerator" in refused.stderr


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(1200)
def test_verdicts_of_a_run_reach_every_place(tmp_path: Path) -> None:
    write_tokenizer(make_checkpoint(tmp_path / "model", "llama"))
    corpus = write_corpus(tmp_path / "heldout.jsonl")
    (tmp_path / "tiny.yaml").write_text(TINY_SUITE.format(corpus=corpus, shape=SHAPE).split("speed:")[0])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: model\nvariants: {w4a16: [{quantize: int4_g128}]}\nevaluate: {suite: tiny.yaml, verify: [transformers, vllm]}\n"
    )
    out = tmp_path / "out"
    done = quantlab("run", recipe, "--out", out, cache=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "transformers: agrees, vllm: not here" in done.stdout
    artifact, record = out / "artifacts" / "w4a16", out / "records" / "w4a16.json"
    verdicts = read_verdicts(artifact)
    assert [(one.engine, one.verdict) for one in verdicts] == [("transformers", "agrees"), ("vllm", "not here")]
    assert read_record(record).engines == verdicts
    assert "| **agrees** |" in (artifact / "README.md").read_text()
    assert "transformers: agrees, vllm: not here" in (out / "matrix.md").read_text()

    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and ".baseline" not in path.parts}
    assert quantlab("run", recipe, "--out", out, "--quiet", cache=tmp_path).returncode == 0
    assert {path: path.read_bytes() for path in before} == before, "nothing is judged again"

    done = quantlab("verify", artifact, "--engine", "transformers", "--tokens", "200", "--json", cache=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert {check["verdict"] for check in told["checks"]} == {"ok"}
    (found,) = told["engines"]
    assert (found["verdict"], found["source_note"]) == ("agrees", "")
    assert found["source_nll_rms"] is not None, "the source was found by its fingerprint"
    assert read_record(record).engines[0].tokens == found["tokens"] < verdicts[0].tokens
