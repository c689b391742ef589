"""The format `compressed-tensors` of FP8 blocks: its library, transformers and quantlab's runtime read the same weights."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import FP8_BLOCK
from safetensors.torch import load_file
from torch import Tensor

from quantlab.checkpoint.index import open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.errors import ArtifactError
from quantlab.exports.export import export
from quantlab.formats.engine_rules.rule import Finding
from quantlab.formats.engine_rules.table import RULES
from quantlab.formats.read_contents import contents_of
from quantlab.formats.stored import StoredWeights
from quantlab.plan.compile import compile_plan
from quantlab.recipe.load import load_recipe
from quantlab.runtime.load import load
from tests.checkpoints import make_checkpoint
from tests.exports.artifacts import make_artifact
from tests.runtime.tiny import relative_error

TOKENS = torch.arange(1, 33).view(2, 16)
EVERYTHING = "[{quantize: fp8_block, targets: [attention, kv_b, dense_mlp, shared_experts, routed_experts]}]"
SOME = "[{quantize: fp8_block, targets: [attention], ignore: ['*.layers.1.*']}]"
VARIANTS = {
    "dense": ("llama", "[{quantize: fp8_block}]"),
    "some": ("qwen3", SOME),
    "experts": ("deepseek_v3", EVERYTHING),
}


def exported(family: str, passes: str, checkpoints: dict[str, Path], root: Path) -> tuple[Path, Path]:
    artifact = make_artifact(checkpoints[family], passes, root)
    assert export(artifact, "compressed-tensors", root / "export", lambda _: None) == ()
    return artifact, root / "export"


def weights_of(directory: Path) -> StoredWeights:
    return StoredWeights(Reader(open_checkpoint(directory)))


def logits(directory: Path, *, dtype: torch.dtype) -> Tensor:
    """Logits of transformers' model."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    packed = "quantization_config" in json.loads((directory / "config.json").read_text())
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)
    with torch.inference_mode():
        found: Tensor = model(TOKENS).logits
    return found


def finding_of(name: str, directory: Path) -> Finding | None:
    """What a rule finds in a checkpoint."""
    (rule,) = (rule for rule in RULES if rule.name == name)
    return rule.finds(contents_of(open_checkpoint(directory)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_library_decompresses_the_weights_of_the_artifact(
    variant: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    artifact, written = exported(*VARIANTS[variant], checkpoints, tmp_path)
    described = json.loads((written / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(described).config_groups["group_0"]
    assert scheme.format == described["format"] == "float-quantized"
    for preset in ("weights", "input_activations"):
        found, wanted = getattr(scheme, preset).model_dump(), FP8_BLOCK[preset].model_dump()
        assert {key for key in wanted if found[key] != wanted[key]} <= {"observer"}  # how scales were found
    tensors: dict[str, Tensor] = {}
    for path in written.glob("*.safetensors"):
        tensors |= load_file(path)
    ours, compressor, quantized = weights_of(artifact), BaseCompressor.get_value_from_registry("float-quantized"), 0
    assert list(ours.names()) == list(weights_of(written).names())
    for name in ours.names():
        if ours.stored(name) is None:
            assert torch.equal(tensors[name], ours.reader.read(name))
            continue
        quantized += 1
        matrix, module = ours.read_quantized(name), name.removesuffix(".weight")
        parts = {part: tensors[f"{module}.{part}"] for part in ("weight", "weight_scale")}
        assert parts["weight_scale"].dtype == torch.float32
        assert torch.equal(compressor.decompress(parts, scheme)["weight"], matrix.dequantize(torch.float32))
        assert torch.equal(parts["weight"].view(torch.uint8), matrix.q.view(torch.uint8))
    assert quantized == {"dense": 21, "some": 8}.get(variant, quantized)
    assert variant == "dense" or described["ignore"] != ["lm_head"]


@pytest.mark.parametrize("variant", ["dense", "some"])
def test_transformers_computes_what_our_runtime_computes(
    variant: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """In bfloat16 transformers' logits are those of the plain weights; ours are in float32, where only the order of sums differs."""
    artifact, written = exported(*VARIANTS[variant], checkpoints, tmp_path)
    export(artifact, "dense", tmp_path / "dense", lambda _: None)
    assert torch.equal(logits(written, dtype=torch.bfloat16), logits(tmp_path / "dense", dtype=torch.bfloat16))
    expected = logits(tmp_path / "dense", dtype=torch.float32)
    for directory in (artifact, written):
        with torch.inference_mode():
            ours = load(directory, dtype=torch.float32)(TOKENS).logits
        assert relative_error(ours, expected) < 1e-5


def test_our_runtime_reads_experts(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with torch.inference_mode():
        first, second = (load(one)(TOKENS).logits for one in exported(*VARIANTS["experts"], checkpoints, tmp_path))
    assert torch.equal(first, second)


def test_transformers_refuses_experts_of_several_blocks(tmp_path: Path) -> None:
    """The rule transformers-fp8-block-experts; one block of an expert is a scale that fits any shape."""
    make_checkpoint(tmp_path / "wide", "deepseek_v2", sizes={"moe_intermediate_size": 256})
    artifact, written = exported("wide", EVERYTHING, {"wide": tmp_path / "wide"}, tmp_path)
    assert finding_of("transformers-fp8-block-experts", artifact) is None
    assert finding_of("transformers-fp8-block-experts", written) is not None
    with pytest.raises(RuntimeError):
        logits(written, dtype=torch.bfloat16)


def test_vllm_refuses_ragged_blocks_in_either_form(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "ragged", "llama", sizes={"intermediate_size": 192})
    for directory in exported("ragged", "[{quantize: fp8_block}]", {"ragged": tmp_path / "ragged"}, tmp_path):
        assert finding_of("vllm-ragged-fp8-gate", directory) is not None


RECIPE = "model: {model}\nvariants:\n  a: {{passes: {passes}, format: [compressed-tensors, dense]}}\n"


@pytest.mark.parametrize(
    ("passes", "exports"),
    [
        ("[{quantize: fp8_block}]", ("compressed-tensors", "dense")),
        ("[{quantize: int4_g128}]", ("dense",)),
        ("[{cast: float16}]", ("dense",)),
    ],
)
def test_a_recipe_writes_it_beside_fp8_alone(
    passes: str, exports: tuple[str, ...], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=checkpoints["llama"], passes=passes))
    recipe = load_recipe(tmp_path / "recipe.yaml").recipe
    (variant,) = compile_plan(recipe, open_checkpoint(checkpoints["llama"])).variants
    assert variant.exports == exports


def test_the_command_line_names_what_is_in_it_already(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    artifact = make_artifact(checkpoints["llama"], "[{quantize: int8}]", tmp_path)
    with pytest.raises(ArtifactError, match="cannot express this artifact") as caught:
        export(artifact, "compressed-tensors", tmp_path / "out", lambda _: None)
    assert caught.value.found == "the artifact is in it already: compressed-tensors"
