"""Verdicts: fake engines whose answers are known, and transformers on tiny models of every family and scheme."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantlab.errors import ArtifactError, EvaluationError
from quantlab.evaluation.engines import engine as engines
from quantlab.evaluation.engines.criteria import Differences, Ground, criterion, greedy_agreement, outcome
from quantlab.evaluation.engines.engine import ENGINES, Engine
from quantlab.evaluation.engines.judge import Judge, Judging, Sources
from quantlab.evaluation.engines.judged import find_source, judged_of
from quantlab.evaluation.engines.layers import (
    ABSMAX_127_5,
    EXPERTS,
    NOT_ROUNDED,
    compare_layers,
    probe_inputs,
    stored_weights,
)
from quantlab.evaluation.engines.own import Rounded, compute, rounded
from quantlab.evaluation.engines.record_verdicts import judge_directory
from quantlab.evaluation.engines.scripts import transformers as script
from quantlab.evaluation.engines.text import judged_text
from quantlab.evaluation.engines.verdict import EngineVerdict, manifest_sha256, read_verdicts, write_verdict
from quantlab.evaluation.measured import Measured
from quantlab.exports.writers.dense import expanded, write_expanded
from tests.engines.conftest import ANSWER, WRITE
from tests.evaluation.test_verify import make

SMALL = Judging(tokens=120, greedy_tokens=2)
WHOLE = pytest.mark.skipif(
    "QUANTLAB_TRANSFORMERS_PYTHON" not in os.environ,
    reason="a minute each: set QUANTLAB_TRANSFORMERS_PYTHON for all families",
)


@pytest.fixture(scope="module")
def artifact(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make(checkpoints["llama"], "  w4a16: [{quantize: int4_g128}]\n", tmp_path_factory.mktemp("judged"))
    return directory.artifact("w4a16")


@pytest.fixture(scope="module")
def judge(artifact: Path, checkpoints: dict[str, Path]) -> Judge:
    """A judge that computes the artifact once for all fake engines."""
    return Judge(judged_of(artifact), replace(SMALL, pythons={"vllm": Path(sys.executable)}))


@pytest.fixture
def answer(
    judge: Judge, fake: Callable[[str], Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., EngineVerdict]:
    """The verdict on a fake vllm that answers what quantlab's runtime computes, changed by some lines of Python."""

    def ask(change: str) -> EngineVerdict:
        own = judge._own
        np.savez(tmp_path / "own.npz", nll=own.nll, top=own.top, greedy=own.greedy)
        right = f"own = np.load({str(tmp_path / 'own.npz')!r})\ntensors = {{'nll': own['nll'].astype(np.float32), 'top': own['top'], 'greedy': own['greedy']}}\n"
        engine = replace(fake(ANSWER + right + change + WRITE), name="vllm", seconds=300.0)
        monkeypatch.setitem(engines.ENGINES, "vllm", engine)
        return judge.verdict("vllm")

    return ask


@pytest.mark.slow
def test_answers_and_their_verdicts(answer: Callable[..., EngineVerdict]) -> None:
    same = answer("")
    assert (same.verdict, same.reason) == ("agrees", "")
    assert same.nll_rms is not None
    assert same.nll_rms < 1e-6
    assert (same.top1_agreement, same.greedy_agreement) == (1.0, 1.0)
    assert "rms at most 0.0001 nats (float32)" in same.criterion

    far = answer("tensors['nll'] += np.float32(0.01)\n")
    assert far.verdict == "differs"
    assert far.nll_difference is not None
    assert far.nll_difference.value == pytest.approx(0.01, rel=1e-3)
    assert "rms 0.01 nats" in far.reason

    nan = answer("tensors['nll'][3] = np.nan\n")
    assert (nan.verdict, nan.nll_rms) == ("differs", None)
    assert nan.reason.startswith("1 of ")

    told = answer(
        "report['missing'] = ['model.norm.weight', 'lm_head.weight']\n"
        "report['unquantized'] = ['model.layers.0.self_attn.qkv_proj', 'lm_head']\n"
        "report['replaced'] = ['int4 products']\n"
    )
    assert told.verdict == "differs"
    assert told.reason == "2 parameters have no tensor, the first is model.norm.weight"
    assert told.left_unquantized == ("model.layers.0.self_attn.qkv_proj",)
    assert told.replaced == ("int4 products",)

    refused = answer("raise ValueError('no int4')\n")
    assert (refused.verdict, refused.reason) == ("refuses", "ValueError: no int4")
    rounding = answer(
        "report['dtype'] = 'bfloat16'; tensors['nll'] += np.random.default_rng(0).normal(0, 1e-3, len(tensors['nll'])).astype(np.float32)\n"
    )
    assert rounding.verdict == "agrees"
    assert "bfloat16" in rounding.criterion


def test_greedy_texts_agree_up_to_the_first_difference_or_an_end() -> None:
    expected = np.array([[1, 2, 3, 4], [1, 2, 3, 4]])
    for found, share in (
        ([[1, 2, 3, 4], [1, 2, 3, 4]], 1.0),
        ([[1, 9, 3, 4], [1, 2, 3, 4]], 0.625),
        ([[9, 2, 3, 4], [1, 2, -1, -1]], 0.5),
        ([[-1, -1, -1, -1], [1, 2, 9, 4]], 0.75),
    ):
        assert greedy_agreement(np.array(found), expected) == share


def test_what_cannot_be_asked_is_not_here(artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    judge = Judge(judged_of(artifact), SMALL)
    for name, reason in (
        ("vllm", "there is no environment: `quantlab engines install vllm`, --engine-python, or QUANTLAB_VLLM_PYTHON"),
        ("llama.cpp", "llama.cpp reads gguf, and this is compressed-tensors: write it with `quantlab export --format`"),
        ("sglang", "by its rules, not run: SGLang 0.5.23: no rule objects"),
    ):
        found = judge.verdict(name)
        assert (found.verdict, found.reason) == ("not here", reason)
    without = replace(ENGINES["vllm"], package="a-package-that-is-not-there")
    monkeypatch.setitem(engines.ENGINES, "vllm", without)
    found = Judge(judged_of(artifact), replace(SMALL, pythons={"vllm": Path(sys.executable)})).verdict("vllm")
    assert "has no a-package-that-is-not-there" in found.reason


def test_an_engine_that_computes_the_source_wrongly_gives_no_verdict(
    artifact: Path, checkpoints: dict[str, Path], fake: Callable[[str], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engines.ENGINES, "vllm", replace(fake(ANSWER + WRITE), name="vllm"))
    how = replace(SMALL, pythons={"vllm": Path(sys.executable)}, source=checkpoints["llama"])
    found = Judge(judged_of(artifact), how).verdict("vllm")
    assert found.verdict == "not here"
    assert "computes the source model itself wrongly on this machine: mean nll 2.000 instead of" in found.reason


def test_verdicts_are_kept_for_one_manifest(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "artifact"
    shutil.copytree(artifact, copy)
    first = EngineVerdict(engine="vllm", format="compressed-tensors", verdict="refuses", reason="r")
    write_verdict(copy, first)
    write_verdict(copy, first.model_copy(update={"format": "dense"}))
    assert write_verdict(copy, first.model_copy(update={"verdict": "agrees"})) == read_verdicts(copy)
    assert [(one.format, one.verdict) for one in read_verdicts(copy)] == [
        ("compressed-tensors", "agrees"),
        ("dense", "refuses"),
    ]
    (copy / "manifest.json").write_bytes((copy / "manifest.json").read_bytes() + b"\n")
    assert read_verdicts(copy) == ()
    (copy / "verdicts.json").write_text('{"verdicts": 1}')
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_verdicts(copy)


def test_the_source_is_found_by_its_fingerprint(artifact: Path, checkpoints: dict[str, Path]) -> None:
    assert find_source(artifact) == checkpoints["llama"].resolve()
    assert find_source(artifact, checkpoints["llama"]) == checkpoints["llama"]
    with pytest.raises(EvaluationError, match="made from another model"):
        find_source(artifact, checkpoints["qwen2"])


def test_inputs_are_rounded_by_groups() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = torch.empty_like(x)
    for row in range(3):
        for start in (0, 32):
            part = x[row, start : start + 32]
            scale = part.abs().max() / 127
            expected[row, start : start + 32] = (part / scale).round() * scale
    assert torch.equal(rounded(x, 127.0, group=32), expected)


def dense_export(artifact: Path, directory: Path) -> Path:
    """A dense export, as another program would write it."""
    directory.mkdir()
    write_expanded(stored_weights(artifact), directory)
    about = {
        "format": "dense",
        "artifact": str(artifact),
        "artifact_manifest_sha256": manifest_sha256(artifact),
        "files": {},
    }
    (directory / "export.json").write_text(json.dumps(about))
    return directory


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(900)
def test_an_export_agrees_with_its_artifact_and_a_tampered_one_differs(artifact: Path, tmp_path: Path) -> None:
    export = dense_export(artifact, tmp_path / "dense")
    (found,) = judge_directory(export, ("transformers",), SMALL)
    assert (found.verdict, found.format, found.reason) == ("agrees", "dense", "")
    assert found.export_sha256
    assert read_verdicts(artifact) == (found,)
    (shard,) = export.glob("*.safetensors")
    name, tensors = "model.layers.1.mlp.up_proj.weight", load_file(shard)
    save_file(tensors | {name: 1.01 * tensors[name]}, shard)
    (found,) = judge_directory(export, ("transformers",), SMALL)
    assert found.verdict == "differs"
    index = json.loads((export / "model.safetensors.index.json").read_text())
    del index["weight_map"][name], tensors[name]
    save_file(tensors, shard)
    (export / "model.safetensors.index.json").write_text(json.dumps(index))
    (found,) = judge_directory(export, ("transformers",), SMALL)
    assert (found.verdict, found.missing) == ("differs", (name,))
    (artifact / "verdicts.json").unlink()


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("family", "variants"),
    [
        ("llama", {"fp16": "{cast: float16}", "w4a16": "{quantize: int4_g128}", "int8": "{quantize: int8}"}),
        pytest.param("qwen2", {"w4a16": "{quantize: int4_g64}", "fp8": "{quantize: fp8_block}"}, marks=WHOLE),
        pytest.param("qwen3", {"int8_weight": "{quantize: int8_weight}"}, marks=WHOLE),
        pytest.param("deepseek_v2", {"w4a16": "{quantize: int4_g128}"}, marks=WHOLE),
        pytest.param(
            "deepseek_v3",
            {
                "int8": "{quantize: int8}",
                "w4a16-experts": "{quantize: int4_g128, targets: [routed_experts]}",
            },
            marks=WHOLE,
        ),
    ],
)
def test_transformers_judges_every_family_and_scheme(
    family: str, variants: dict[str, str], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    recipe = "".join(f"  {name}: [{step}]\n" for name, step in variants.items())
    directory, sources = make(checkpoints[family], recipe, tmp_path), Sources()
    for variant in variants:
        how = replace(SMALL, source=checkpoints[family])
        found = Judge(judged_of(directory.artifact(variant)), how, sources).verdict("transformers")
        assert found.source_nll_rms is not None, found.source_note
        assert found.source_nll_rms < 1e-4
        assert not found.missing
        assert not found.left_unquantized
        if variant != "int8":
            assert found.verdict == "agrees", found.reason
            if "deepseek" in family:
                assert found.nll_median is not None
                assert found.nll_median < 1e-5, "all but the tokens after a value that rounds the other way: 5e-7 seen"
                assert found.weights == "routed experts in bfloat16, other linears in float32"
                assert "single experts equal from the same inputs" in found.criterion
                assert {layer.rule for layer in found.layers if layer.module.endswith(EXPERTS)} == {NOT_ROUNDED}
            else:
                assert bool(found.weights) == (variant != "fp16")
                assert found.top1_agreement == 1.0
        elif family == "deepseek_v3":
            assert found.verdict == "refuses", "transformers 5 reads no int8 experts"
        else:  # its rule for rounding activations is another one, which mean and rms hide
            assert found.verdict == "differs"
            assert {layer.rule for layer in found.layers} == {ABSMAX_127_5}
            assert found.layers[0].module.endswith("o_proj")
            assert ABSMAX_127_5 in found.reason
            assert found.activation_rms is not None


@pytest.mark.slow
def test_transformers_holds_packed_experts_in_the_dtype_of_their_scales(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """In float32 too, where it holds all other linears in float32; single experts show an error in one of them."""
    artifact = make(checkpoints["deepseek_v2"], "  w4a16: [{quantize: int4_g128}]\n", tmp_path).artifact("w4a16")
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
    inputs = {name: x for name, x in probe_inputs(artifact, experts=True).items() if name.endswith(EXPERTS)}
    outputs = {}
    with torch.inference_mode():
        model(torch.arange(4)[None])  # expands the linears
        for name, x in inputs.items():
            module = model.get_submodule(name)
            assert script.stacked_dtype(model, name) == "bfloat16"
            expected = [
                torch.cat([expanded(stored_weights(artifact), f"{name}.{expert}.{part}_proj.weight", exact=False) for part in ("gate", "up")])
                for expert in range(module.num_experts)
            ]  # fmt: skip
            assert torch.equal(module.gate_up_proj, torch.stack(expected))
            outputs[name] = script.experts(module, torch.from_numpy(x)).double().numpy()
    linear = "model.layers.1.self_attn.o_proj"
    exact = expanded(stored_weights(artifact), f"{linear}.weight", exact=True)
    assert torch.equal(model.get_submodule(linear).weight, exact)
    assert not torch.equal(exact, exact.bfloat16().float())

    dtype = lambda _: "bfloat16"  # noqa: E731
    found = compare_layers(artifact, inputs, outputs, dtype)
    assert [layer.module for layer in found] == list(inputs)
    assert {layer.rule for layer in found} == {NOT_ROUNDED}
    for name in outputs:
        outputs[name][3] *= 1.02
    assert {layer.rule for layer in compare_layers(artifact, inputs, outputs, dtype)} == {""}


def found_with(*, rms: float, median: float, mean: float = 0.0) -> Differences:
    return Differences(Measured(value=mean, low=mean - 1e-3, high=mean + 1e-3, n=100), rms, median, 1.0, None)


def test_rounded_inputs_bound_the_median_and_the_mean_and_leave_single_tokens_to_routing() -> None:
    ground = Ground("float32", inputs_dtype="float16", inputs_median=6e-4)
    assert criterion(ground)[0] == pytest.approx(9e-4)
    assert outcome(ground, found_with(rms=0.02, median=6.3e-4), ()) == ("agrees", "")
    verdict, reason = outcome(ground, found_with(rms=0.02, median=1e-3), ())
    assert (verdict, reason) == ("differs", "median 0.001 nats, at most 0.0009 are explained")
    verdict, reason = outcome(ground, found_with(rms=0.02, median=6e-4, mean=0.002), ())
    assert verdict == "differs"
    assert reason.startswith("mean difference")


@pytest.mark.slow
def test_the_runtime_rounds_where_an_engine_does(checkpoints: dict[str, Path]) -> None:
    source = checkpoints["deepseek_v2"]
    text = judged_text(source, tokens=120)
    plain = compute(source, text)
    steps = {}
    for dtype in (torch.float16, torch.bfloat16):
        for where in (Rounded(experts=dtype), Rounded(inputs=dtype)):
            steps[dtype, where.experts is not None] = np.abs(compute(source, text, where=where).nll - plain.nll)
    for experts in (True, False):
        coarse, fine = np.median(steps[torch.bfloat16, experts]), np.median(steps[torch.float16, experts])
        assert 1e-7 < fine < coarse / 3, "three bits more"
