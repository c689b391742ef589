"""The formats of bitsandbytes: against its own files, and loaded by transformers with bitsandbytes."""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantlab.algorithms.llm_int8 import to_rowwise_int8
from quantlab.algorithms.nf4 import LEVELS, from_normal_floats, nest, to_normal_floats, unnest
from quantlab.checkpoint.index import open_checkpoint
from quantlab.errors import ArtifactError
from quantlab.exports.bitsandbytes import NF4, NF4_DOUBLE
from quantlab.exports.export import export, open_artifact
from quantlab.exports.targets import TARGETS
from quantlab.exports.writers.bitsandbytes import int8_tensors, nf4_tensors
from quantlab.formats.contents import Weight
from quantlab.recipe.schemes import FormatName
from tests.exports.artifacts import make_artifact, weight
from tests.exports.golden.weights import weight as golden_weight

GOLDEN = Path(__file__).parent / "golden" / "bitsandbytes.safetensors"
PYTHON = os.environ.get("QUANTLAB_TRANSFORMERS_PYTHON", "")
FORMATS: tuple[FormatName, ...] = ("bnb-int8", "bnb-nf4", "bnb-nf4-double")


def golden(name: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(f"{name}."): tensor for key, tensor in load_file(GOLDEN).items() if key.startswith(f"{name}.")
    }


def layout(matrix: Tensor) -> Weight:
    return weight("weight", tuple(matrix.shape))


def same_state(ours: Tensor, theirs: Tensor) -> bool:
    return json.loads(bytes(ours.tolist())) == json.loads(bytes(theirs.tolist()))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        if name.endswith("bitsandbytes__nf4"):
            assert same_state(ours[name], tensor)  # the mean is written with a fixed number of digits
        else:
            assert torch.equal(ours[name], tensor), name


def test_int8_is_what_bitsandbytes_stores() -> None:
    matrix = golden_weight(25, 40)
    matrix[1, 0] = 0.5
    ours = int8_tensors(weight("x.weight", tuple(matrix.shape)), matrix)
    assert_same({name.removeprefix("x."): tensor for name, tensor in ours.items()}, golden("int8"))


def test_nf4_is_what_bitsandbytes_stores() -> None:
    matrix = golden_weight(25, 40)  # the last of its blocks is shorter
    matrix[1, 0] = 0.5
    ours, theirs = nf4_tensors(layout(matrix), matrix, double=False), golden("nf4")
    assert_same(ours, theirs)
    assert bytes(ours["weight.quant_state.bitsandbytes__nf4"].tolist()) == bytes(
        theirs["weight.quant_state.bitsandbytes__nf4"].tolist()
    )


def test_double_quantization_is_what_bitsandbytes_stores() -> None:
    matrix = golden_weight(136, 128)  # 272 blocks: 16 in the second block of magnitudes
    assert_same(nf4_tensors(layout(matrix), matrix, double=True), golden("nf4-double"))


@pytest.mark.parametrize("target", [NF4, NF4_DOUBLE], ids=lambda target: target.name)
@pytest.mark.parametrize("scale", [1e-30, 0.03, 1e30])
def test_the_announced_tensors_are_those_written(target, scale: float) -> None:
    matrix = (torch.randn(7, 100) * scale).to(torch.bfloat16)
    written = nf4_tensors(layout(matrix), matrix, double=target.double)
    names = {"F32": torch.float32, "U8": torch.uint8}
    for (name, tensor), announced in zip(written.items(), target.stored_tensors(layout(matrix)), strict=True):
        assert (name, tensor.dtype, tuple(tensor.shape)) == (announced[0], names[announced[1]], announced[2])


def test_nf4_takes_the_nearest_level_of_every_block() -> None:
    W = torch.randn(6, 50) * torch.tensor([1e-3, 0.1, 1, 0, 30, 1])[:, None]
    floats = to_normal_floats(W, block=64)
    values = from_normal_floats(floats.packed, floats.absmax, block=64, shape=(6, 50)).flatten()
    flat = W.flatten()
    for start in range(0, flat.numel(), 64):
        block = flat[start : start + 64]
        grid = torch.tensor(LEVELS) * block.abs().max()
        nearest = (block[:, None] - grid).abs().min(dim=1).values
        assert torch.allclose((block - values[start : start + 64]).abs(), nearest, atol=1e-6 * block.abs().max().item())


def test_double_quantization_keeps_the_magnitudes_nearly() -> None:
    absmax = torch.rand(1000) * 0.1
    restored = unnest(nest(absmax))
    spread = (absmax - absmax.mean()).abs().max()
    assert (restored - absmax).abs().max() <= 0.0071 * spread  # half of the widest step, 0.0141


def test_a_row_of_zeros_stays_zero() -> None:
    rowwise = to_rowwise_int8(torch.tensor([[0.0, 0.0], [1.0, -0.5]]))
    assert rowwise.q.tolist() == [[0, 0], [127, -64]]  # half a step rounds to the even number
    assert rowwise.absmax.tolist() == [0, 1]


def test_weights_beyond_float16_are_refused() -> None:
    with pytest.raises(ArtifactError, match="too large for bitsandbytes' int8"):
        int8_tensors(weight("x.weight", (1, 2)), torch.tensor([[1e6, 1.0]]))


@pytest.mark.parametrize("scheme", ["int8", "int8_weight"])
def test_integers_of_an_artifact_are_copied(scheme: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    artifact = make_artifact(checkpoints["qwen2"], f"[{{quantize: {scheme}, targets: [attention]}}]", tmp_path)
    export(artifact, "bnb-int8", tmp_path / "export", lambda _: None)
    written, stored = _tensors(tmp_path / "export"), open_artifact(artifact).stored
    quantized = [name for name in stored.names() if stored.format_of(name) is not None]
    assert len(quantized) == 12
    for name in quantized:
        matrix = stored.read(name)
        assert torch.equal(written[name], matrix.q)
        restored = written[name].double() * written[f"{name.removesuffix('weight')}SCB"].double()[:, None] / 127
        assert torch.allclose(restored, matrix.q.double() * matrix.scale.double(), rtol=1e-12, atol=0)
    config = open_checkpoint(tmp_path / "export").config["quantization_config"]
    assert config["llm_int8_threshold"] == (0.0 if scheme == "int8" else 6.0)
    assert len(config["llm_int8_skip_modules"]) == 1 + 9  # the head, and three matrices of every MLP


def _tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(
    ("family", "passes", "format", "reason"),
    [
        ("llama", "[{quantize: int8}]", "bnb-nf4", "rounded twice"),
        ("llama", "[{quantize: int4_g128}]", "bnb-int8", "int4_g128 would be rounded once more"),
        ("llama", "[{quantize: fp8_block}]", "bnb-int8", "fp8_block would be rounded once more"),
        ("deepseek_v2", "[{cast: bfloat16}]", "bnb-nf4", "routed experts"),
        ("deepseek_v3", "[{cast: bfloat16}]", "bnb-int8", "routed experts"),
    ],
)
def test_what_the_formats_refuse(
    family: str, passes: str, format: FormatName, reason: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    artifact = make_artifact(checkpoints[family], passes, tmp_path)
    with pytest.raises(ArtifactError, match=reason):
        export(artifact, format, tmp_path / "export", lambda _: None)
    assert not (tmp_path / "export").exists()


def _peer(*arguments: object) -> None:
    if not PYTHON:
        pytest.skip("QUANTLAB_TRANSFORMERS_PYTHON names no environment")
    if subprocess.run([PYTHON, "-c", "import bitsandbytes, accelerate"], capture_output=True).returncode:
        pytest.skip("the environment has no bitsandbytes")
    script = Path(__file__).with_name("peer_bitsandbytes.py")
    done = subprocess.run([PYTHON, str(script), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.engine
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("format", FORMATS)
def test_a_checkpoint_is_what_bitsandbytes_saves(
    format: FormatName, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Every tensor of a checkpoint that transformers quantized and saved, and its description."""
    _peer("save", checkpoints["qwen3"], tmp_path / "theirs", format)
    artifact = make_artifact(checkpoints["qwen3"], "[{cast: bfloat16}]", tmp_path)
    export(artifact, format, tmp_path / "ours", lambda _: None)
    assert_same(_tensors(tmp_path / "ours"), _tensors(tmp_path / "theirs"))
    ours = open_checkpoint(tmp_path / "ours").config["quantization_config"]
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    assert ours.pop("llm_int8_skip_modules") == ["lm_head"]
    assert theirs.pop("llm_int8_skip_modules") is None  # transformers finds the head by itself
    assert ours == theirs


@pytest.mark.engine
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("family", "passes", "format"),
    [
        ("llama", "[{cast: bfloat16}]", "bnb-nf4"),
        ("qwen2", "[{cast: float16}]", "bnb-nf4-double"),
        ("qwen3", "[{cast: bfloat16}]", "bnb-int8"),
        ("qwen2", "[{quantize: int8}]", "bnb-int8"),
        ("qwen2", "[{quantize: int8_weight, targets: [attention]}]", "bnb-int8"),
    ],
)
def test_transformers_computes_with_an_export(
    family: str, passes: str, format: FormatName, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    artifact = make_artifact(checkpoints[family], passes, tmp_path)
    export(artifact, format, tmp_path / "export", lambda _: None)
    _peer("load", tmp_path / "export", tmp_path / "seen")
    told = json.loads((tmp_path / "seen" / "told.json").read_text())
    assert told["missing"] == []
    assert told["unexpected"] == []
    converted = {weight.module for weight in TARGETS[format].converted(open_artifact(artifact).contents)}
    wanted = "Linear8bitLt" if format == "bnb-int8" else "Linear4bit"
    assert {name for name, kind in told["linears"].items() if kind == wanted} == converted
    theirs = load_file(tmp_path / "seen" / "logits.safetensors")["logits"]
    expected = _dense_logits(tmp_path / "export", artifact)
    nll = [-torch.log_softmax(logits, -1)[range(95), range(1, 96)] for logits in (theirs, expected)]
    rms = math.sqrt((nll[0] - nll[1]).square().mean().item())
    print(f"{family} {passes} {format}: rms {rms:.2e} nats")
    assert rms < (1e-4 if format != "bnb-int8" else 0.1)  # products of LLM.int8() are those of rounded activations


def _dense_logits(directory: Path, artifact: Path) -> Tensor:
    """Logits of the source's modules with the dequantized weights of an export, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    stored, state = _tensors(directory), {}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        if tensor.is_floating_point() and ".weight." not in name and part != "SCB":
            state[name] = tensor.float()
        elif f"{module}.SCB" in stored and part == "weight":
            state[name] = tensor.float() * stored[f"{module}.SCB"][:, None] / 127
        elif f"{name}.quant_map" in stored:
            state[name] = _expanded(stored, name)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(artifact), dtype=torch.float32)
    model.load_state_dict(state)
    with torch.no_grad():
        return model.eval()(torch.arange(96)[None]).logits[0]


def _expanded(stored: dict[str, Tensor], name: str) -> Tensor:
    """The oracle: level by level of the stored tables."""
    said = json.loads(bytes(stored[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
    absmax = stored[f"{name}.absmax"]
    if f"{name}.nested_absmax" in stored:
        table, of = stored[f"{name}.nested_quant_map"], stored[f"{name}.nested_absmax"]
        absmax = table[absmax.long()] * of.repeat_interleave(256)[: absmax.numel()] + said["nested_offset"]
    bits = stored[name].flatten().long()
    levels = stored[f"{name}.quant_map"][torch.stack([bits // 16, bits % 16], 1).flatten()]
    return (levels * absmax.repeat_interleave(said["blocksize"])).view(said["shape"])
