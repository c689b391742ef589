"""A row of another tool's artifact: measured like a variant, named as foreign, measured again when its files change."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from quantlab.exports.export import export
from tests.checkpoints import make_checkpoint
from tests.evaluation.conftest import TINY_SUITE, write_corpus, write_tokenizer
from tests.exports.artifacts import make_artifact
from tests.test_command_line import SHAPE, quantlab

pytestmark = pytest.mark.slow


def test_a_peer_is_a_row_of_its_own(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "llama")
    write_tokenizer(model)
    peer = tmp_path / "peer"
    export(make_artifact(model, "[{quantize: int4_g64}]", tmp_path / "made"), "gptq", peer, lambda _: None)
    (peer / "export.json").unlink()
    export(make_artifact(model, "[{cast: bfloat16}]", tmp_path / "plain"), "bnb-nf4", tmp_path / "nf4", lambda _: None)
    config = json.loads((peer / "config.json").read_text())
    config["quantization_config"]["meta"] = {"quantizer": ["gptqmodel:7.3.4"]}
    (peer / "config.json").write_text(json.dumps(config))
    before = {path: path.read_bytes() for path in peer.iterdir()}
    (tmp_path / "tiny.yaml").write_text(TINY_SUITE.format(corpus=write_corpus(tmp_path / "heldout.jsonl"), shape=SHAPE))
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(
        "model: model\nvariants:\n  w4: [{quantize: int4_g64}]\npeers: {peer-gptq: peer, nf4: nf4}\nevaluate: {suite: tiny.yaml}\n"
    )
    planned = quantlab("plan", recipe)
    assert "peer-gptq: measured, not made: another tool's int4_g64, as gptq; by gptqmodel 7.3.4" in planned.stdout
    done = quantlab("run", recipe, "--out", out)
    assert done.returncode == 0, done.stderr
    source, ours, theirs, levels = json.loads((out / "matrix.json").read_text())["rows"]
    assert (source["foreign"], ours["foreign"]) == (None, None)
    assert theirs["foreign"] == {"method": "gptq", "producer": "gptqmodel 7.3.4"}
    assert (theirs["variant"], theirs["artifact"], theirs["failures"]) == ("peer-gptq", "peer", [])
    assert theirs["weights_bytes"] == ours["weights_bytes"]
    for number in ("kl_to_baseline", "perplexity"):
        # the same integers and scales; float16 scales round their products less than bfloat16 ones
        assert theirs[number]["value"] == pytest.approx(ours[number]["value"], rel=2e-3)
    assert theirs["speed_over_fp16"] is not None
    assert levels["kl_to_baseline"]["value"] > 0
    (left_out,) = levels["failures"]
    assert left_out["cell"] == "speed"
    assert "nf4_g64, which the runtime expands to 16 bits" in left_out["reason"]
    assert "nf4_g64 matrices are expanded to 16 bits when they are loaded" in (out / "matrix.md").read_text().replace(
        "\\", ""
    )
    note = "Made by other tools, only measured by quantlab: peer-gptq (gptq; gptqmodel 7.3.4); nf4 (bitsandbytes; its files name no program)."
    assert note in (out / "matrix.md").read_text()
    assert "only measured by quantlab: peer-gptq" in (out / "matrix.html").read_text()
    assert {path: path.read_bytes() for path in peer.iterdir()} == before, "nothing is written there"

    board = quantlab("leaderboard", out, "--out", tmp_path / "board")
    assert board.returncode == 0, board.stderr
    text = (tmp_path / "board" / "leaderboard.md").read_text()
    assert r"another tool's int4\_g64, as gptq; by gptqmodel 7.3.4" in text
    assert "Made by other tools, only measured by quantlab: " in text
    assert "peer-gptq (gptq; gptqmodel 7.3.4)" in text

    (shard,) = peer.glob("*.safetensors")
    tensors = load_file(shard)
    name = "model.layers.0.mlp.down_proj.scales"
    save_file(tensors | {name: tensors[name] * 1.5}, shard, metadata={"format": "pt"})
    again = quantlab("eval", recipe, "--out", out)
    assert again.returncode == 0, again.stderr
    assert "2 of 4 records kept" in again.stderr
    changed = json.loads((out / "matrix.json").read_text())["rows"][2]
    assert changed["artifact_sha256"] != theirs["artifact_sha256"]
    assert changed["kl_to_baseline"]["value"] > theirs["kl_to_baseline"]["value"]
