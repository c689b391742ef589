"""The format `gguf`: blocks, names and files as the package gguf reads them; permutations and scaled rotary embeddings against
obvious computations; what is refused. `test_llama_cpp.py` runs the files in llama.cpp."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from quantlab.architectures.detect import detect
from quantlab.checkpoint.index import open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.errors import ArtifactError
from quantlab.exports.export import export
from quantlab.exports.gguf.pre_tokenizers import NAMES as PRE_TOKENIZERS
from quantlab.exports.gguf.pre_tokenizers import name_of
from quantlab.exports.gguf.refusal import RefusalError
from quantlab.exports.gguf.rotary import interleaved, read_rotary
from quantlab.exports.gguf.target import TARGET, plan_file
from quantlab.exports.gguf.tensors import NAMES, BlockType, plan_tensors
from quantlab.exports.gguf.token_types import TokenType
from quantlab.exports.gguf.tokenizer import read_vocabulary
from quantlab.exports.writers import gguf as writer
from quantlab.exports.writers.gguf_blocks import Rounded, block_bytes
from quantlab.formats.contents import Contents, Weight
from quantlab.formats.read_contents import contents_of
from quantlab.formats.stored import StoredWeights
from quantlab.numerics.integer import QuantizedMatrix
from tests.checkpoints import CONFIGS
from tests.exports.artifacts import make_artifact, weight

REFERENCE = Path(__file__).parents[2] / "eval" / "reference" / "deepseek-v3-mini"
_TARGETS = "targets: [routed_experts, shared_experts, dense_mlp, attention, kv_b]"


def _matrix(bits: int, groups: int, *, asymmetric: bool = False) -> QuantizedMatrix:
    """[6, 128] of all integers, with scales of both signs that bfloat16 holds."""
    generator = torch.Generator().manual_seed(bits + groups)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    q = torch.randint(low, high, (6, 128), generator=generator).to(torch.int8)
    scale = (torch.randn(6, groups, generator=generator) * 0.01).to(torch.bfloat16)
    zero = torch.randint(low, high, (6, groups), generator=generator).to(torch.int8) if asymmetric else None
    return QuantizedMatrix(q, scale, bits, zero)


def _values(matrix: QuantizedMatrix) -> Tensor:
    """(q - z) * scale in float32, in which it is exact."""
    q = matrix.q.view(*matrix.scale.shape, -1).float()
    zero = 0 if matrix.zero is None else matrix.zero.float()[:, :, None]
    return ((q - zero) * matrix.scale.float()[:, :, None]).view(matrix.q.shape)


def _dequantized(data: Tensor, kind: BlockType) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize(
    ("bits", "groups", "kind"), [(4, 4, "Q4_0"), (4, 1, "Q4_0"), (4, 2, "Q4_0"), (8, 1, "Q8_0"), (8, 4, "Q8_0")]
)
def test_blocks_are_the_integers(bits: int, groups: int, kind: BlockType) -> None:
    matrix, scales = _matrix(bits, groups), Rounded()
    found = _dequantized(block_bytes(matrix, kind, "m.weight", scales=scales, minima=Rounded()), kind)
    assert torch.equal(found, _values(matrix))
    assert (scales.numbers, scales.inexact) == (6 * groups, 0)


@pytest.mark.parametrize("groups", [4, 1])
def test_blocks_with_a_minimum_are_the_integers_with_the_minimum_as_float16(groups: int) -> None:
    matrix, minima = _matrix(4, groups, asymmetric=True), Rounded()
    found = _dequantized(block_bytes(matrix, "Q4_1", "m.weight", scales=Rounded(), minima=minima), "Q4_1")
    scale, zero = matrix.scale.float(), matrix.zero.float()  # type: ignore[union-attr]
    minimum = (-(8 + zero) * scale).half().float()
    steps = matrix.q.view(*scale.shape, -1).float() + 8
    assert torch.equal(found, (steps * scale[:, :, None] + minimum[:, :, None]).view(6, 128))
    assert minima.inexact == int((minimum != -(8 + zero) * scale).sum())
    assert (found - _values(matrix)).abs().max() <= minima.largest * 15 * scale.abs().max() + 1e-12


def test_scales_that_float16_does_not_hold_are_counted_or_refused() -> None:
    matrix = _matrix(8, 1)
    small = QuantizedMatrix(matrix.q, torch.full((6, 1), 2.0**-20 * 1.5078125, dtype=torch.bfloat16), 8)
    scales = Rounded()
    block_bytes(small, "Q8_0", "m.weight", scales=scales, minima=Rounded())
    assert (scales.numbers, scales.inexact) == (6, 6)
    assert 0 < scales.largest < 2**-4
    large = QuantizedMatrix(matrix.q, torch.full((6, 1), 1e5, dtype=torch.bfloat16), 8)
    with pytest.raises(ArtifactError, match="too large for GGUF"):
        block_bytes(large, "Q8_0", "m.weight", scales=Rounded(), minima=Rounded())


@pytest.mark.parametrize("family", CONFIGS)
def test_names_are_those_of_the_package(family: str, checkpoints: dict[str, Path]) -> None:
    contents = _contents(checkpoints[family])
    word = plan_file(contents).architecture
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == word)
    names = gguf.get_tensor_name_map(kind, 3)
    for tensor in plan_tensors(contents).tensors:
        source = tensor.sources[0].replace(".experts.0.", ".experts.")
        if "kv_b_proj" in source:
            source = source.replace("kv_b_proj", "k_b_proj" if "k_b" in tensor.name else "v_b_proj")
        if "e_score_correction_bias" in source:
            source = source.replace("e_score_correction_bias", "e_score_correction.bias")
        assert names.get_name(source, try_suffixes=(".weight", ".bias")) == tensor.name


def test_every_module_has_a_name_of_its_own() -> None:
    assert len(set(NAMES.values())) == len(NAMES)


def test_interleaved_rows_rotate_like_halves() -> None:
    generator = torch.Generator().manual_seed(0)
    width, angles = 8, torch.rand(4, generator=generator)
    head = torch.randn(width, generator=generator)
    cos, sin = angles.cos(), angles.sin()
    first, second = head[:4], head[4:]
    halves = torch.cat([first * cos - second * sin, second * cos + first * sin])
    pairs = head[list(interleaved(width))].view(4, 2)
    rotated = torch.stack([pairs[:, 0] * cos - pairs[:, 1] * sin, pairs[:, 1] * cos + pairs[:, 0] * sin], 1).view(width)
    assert torch.equal(rotated, halves[list(interleaved(width))])


def test_divisors_of_llama3_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    section = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(rope_theta=500000.0, rope_scaling=section, hidden_size=4096, num_attention_heads=32)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2).float() / 128)
    found = read_rotary({"rope_theta": 500000.0, "rope_scaling": section}, width=128, latent=False)
    assert torch.allclose(plain / torch.tensor(found.divisors), scaled, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "passes"),
    [
        ("llama", "[{quantize: int4_g32}]"),
        ("qwen2", "[{quantize: int4_g128_asym}]"),
        ("qwen3", "[{quantize: int8_weight}]"),
        ("deepseek_v2", "[{quantize: int8}]"),
        ("deepseek_v3", f"[{{quantize: int4_g64, {_TARGETS}}}]"),
    ],
)
def test_a_file_holds_the_artifact(family: str, passes: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    artifact = make_artifact(checkpoints[family], passes, tmp_path)
    notes = export(artifact, "gguf", tmp_path / "export", lambda _: None)
    stored = StoredWeights(Reader(open_checkpoint(artifact)))
    reader = gguf.GGUFReader(tmp_path / "export" / "model.gguf")
    expected = _expected(stored, family)
    assert {tensor.name for tensor in reader.tensors} == set(expected)
    for tensor in reader.tensors:
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        wanted = expected[tensor.name]
        assert list(reversed(tensor.shape.tolist())) == list(wanted.shape)
        if tensor.tensor_type.name == "Q4_1":
            assert torch.allclose(found.view(wanted.shape), wanted, rtol=0, atol=2.0**-11 * float(wanted.abs().max()))
        else:
            assert torch.equal(found.view(wanted.shape), wanted), tensor.name
    assert any("no tokenizer" in note for note in notes)
    assert any("repeat" in note for note in notes) == ("g32" not in passes)


def _expected(stored: StoredWeights, family: str) -> dict[str, Tensor]:
    """Every tensor of the file by its name, in float32, from the names of the checkpoint, one by one."""
    config = CONFIGS[family]
    found: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name in stored.names():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"] and int(parts[2]) >= 3:
            continue
        weight = stored.read(name)
        values = _values(weight) if isinstance(weight, QuantizedMatrix) else weight.float()
        if "kv_b_proj" in name:
            heads = weight.dequantize(torch.bfloat16).float() if isinstance(weight, QuantizedMatrix) else values
            keys = [heads.view(4, 64, 128)[head, :32].t() for head in range(4)]
            found[f"blk.{parts[2]}.attn_k_b.weight"] = torch.stack(keys)
            found[f"blk.{parts[2]}.attn_v_b.weight"] = values.view(4, 64, 128)[:, 32:]
            continue
        if family == "llama" and (name.endswith(("q_proj.weight", "k_proj.weight"))):
            rows = values.view(-1, 2, 16, 128)  # heads of two halves of 16
            values = torch.stack([rows[:, 0], rows[:, 1]], dim=2).reshape(values.shape)
        if ".experts." in name:
            experts.setdefault(f"blk.{parts[2]}.ffn_{parts[6].removesuffix('_proj')}_exps.weight", {})[
                int(parts[5])
            ] = values
            continue
        found[_NAMES_BY_HAND.get(name) or f"blk.{parts[2]}.{_OF_A_LAYER['.'.join(parts[3:-1])]}.{parts[-1]}"] = values
    assert config["num_hidden_layers"] == 3
    return found | {name: torch.stack([parts[expert] for expert in range(8)]) for name, parts in experts.items()}


_NAMES_BY_HAND = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.layers.1.mlp.gate.e_score_correction_bias": "blk.1.exp_probs_b.bias",
    "model.layers.2.mlp.gate.e_score_correction_bias": "blk.2.exp_probs_b.bias",
}
_OF_A_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


def _contents(directory: Path) -> Contents:
    return contents_of(open_checkpoint(directory))


def test_the_keys_of_the_reference_model(tmp_path: Path) -> None:
    contents = _contents(REFERENCE)
    stored = StoredWeights(Reader(open_checkpoint(REFERENCE)))
    small = dataclasses.replace(contents, weights=())  # the keys alone
    assert plan_file(small).tensors == ()
    writer.write(stored, small, tmp_path, lambda _: None)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    wanted = {
        "general.architecture": "deepseek2",
        "deepseek2.block_count": 8,
        "deepseek2.attention.head_count_kv": 1,
        "deepseek2.attention.q_lora_rank": 128,
        "deepseek2.attention.key_length": 160,
        "deepseek2.attention.value_length": 128,
        "deepseek2.attention.key_length_mla": 96,
        "deepseek2.attention.value_length_mla": 64,
        "deepseek2.rope.dimension_count": 32,
        "deepseek2.leading_dense_block_count": 1,
        "deepseek2.expert_count": 32,
        "deepseek2.expert_used_count": 4,
        "deepseek2.expert_group_count": 4,
        "deepseek2.expert_group_used_count": 2,
        "deepseek2.expert_gating_func": 2,
        "deepseek2.expert_weights_norm": True,
        "deepseek2.expert_weights_scale": 2.5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
    }
    assert {key: fields[key] for key in wanted} == wanted
    tokenizer = json.loads((REFERENCE / "tokenizer.json").read_text(encoding="utf-8"))
    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    assert {token: number for number, token in enumerate(tokens)} == tokenizer["model"]["vocab"]
    assert [tuple(merge.split(" ")) for merge in merges] == [tuple(merge) for merge in tokenizer["model"]["merges"]]
    assert fields["tokenizer.ggml.token_type"][:4] == [TokenType.CONTROL] * 3 + [TokenType.NORMAL]


def _pre_tokenizer(*patterns: str, bytes_with_regex: bool = False) -> dict[str, Any]:
    splits = [{"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False} for one in patterns]
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": bytes_with_regex}
    return {"type": "Sequence", "pretokenizers": [*splits, last]}


def test_pre_tokenizers_are_recognised_by_their_rules() -> None:
    assert len(set(PRE_TOKENIZERS.values())) == len(PRE_TOKENIZERS)
    llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    qwen2 = llama3.replace("{1,3}", "")
    v3 = (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|"
        "\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    )
    for patterns, whole, name in [
        ((llama3,), True, "llama-bpe"),
        ((qwen2,), False, "qwen2"),
        (v3, False, "deepseek-v3"),
    ]:
        content = {"pre_tokenizer": _pre_tokenizer(*patterns), "model": {"ignore_merges": whole}}
        assert name_of(content) == name
    with pytest.raises(RefusalError, match=r"knows no pre-tokenizer with these steps: \\w\+"):
        name_of({"pre_tokenizer": _pre_tokenizer(r"\w+"), "model": {}})
    with pytest.raises(RefusalError, match="ends in plain ByteLevel, found Metaspace"):
        name_of({"pre_tokenizer": {"type": "Metaspace"}, "model": {}})


def _with_tokenizer(tmp_path: Path, **changes: Any) -> Path:
    """A directory with the reference model's tokenizer, changed."""
    content = json.loads((REFERENCE / "tokenizer.json").read_text(encoding="utf-8"))
    model = changes.pop("model", {})
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, **changes, "model": {**content["model"], **model}}))
    shutil.copy(REFERENCE / "tokenizer_config.json", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pre_tokenizer": _pre_tokenizer(r"\d+", bytes_with_regex=True)}, r"these steps: \d+ > the pattern of GPT-2"),
        ({"normalizer": {"type": "Lowercase"}}, "does not normalise text, the tokenizer does: Lowercase"),
        ({"model": {"byte_fallback": True}}, "replaces spaces by ▁ and does nothing else"),
        ({"model": {"type": "WordPiece"}}, "of type WordPiece"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    contents = dataclasses.replace(_contents(REFERENCE), directory=_with_tokenizer(tmp_path, **changes))
    refusal = TARGET.refuses(contents)
    assert refusal is not None
    assert reason in refusal


def test_chat_templates_and_several_end_tokens_are_kept(tmp_path: Path) -> None:
    directory = _with_tokenizer(tmp_path)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    vocabulary = read_vocabulary(directory, {"vocab_size": 8200})
    assert vocabulary is not None
    assert vocabulary.chat_template == "{{ messages }}"
    assert vocabulary.special == {"bos": 0, "eos": 1, "eot": 7, "padding": 2}
    assert vocabulary.tokens[8192:] == tuple(f"[PAD{number}]" for number in range(8192, 8200))
    assert set(vocabulary.types[8192:]) == {TokenType.UNUSED}


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        (
            "deepseek_v2",
            {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
            "sum of its two best experts, this model by its best expert",
        ),
        ("deepseek_v3", {"n_group": 8, "topk_group": 4}, "at least two experts"),
        ("deepseek_v3", {"n_shared_experts": 0}, "the model has none"),
        ("deepseek_v3", {"num_hidden_layers": 27}, "as one without query latent"),
        ("deepseek_v3", {"hidden_act": "gelu"}, "silu"),
        ("deepseek_v3", {"rope_scaling": _YARN}, "mscale and mscale_all_dim are equal"),
        ("deepseek_v3", {"rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}, "found 1.0 and 0.5"),
        ("llama", {"rope_scaling": {**_YARN, "beta_fast": 16}}, "beta_fast 32 in this family, found 16"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "type dynamic"),
        ("llama", {"max_position_embeddings": None}, "max_position_embeddings"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, "one of 64 tokens"),
        ("qwen2", {"head_dim": 64}, "as wide as hidden_size"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(
    family: str, fields: Mapping[str, Any], reason: str, tmp_path: Path
) -> None:
    config = {name: value for name, value in {**CONFIGS[family], **fields}.items() if value is not None}
    contents = Contents(detect(config), config, (), tmp_path, "dense")
    refusal = TARGET.refuses(contents)
    assert refusal is not None
    assert reason in refusal


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (
            weight("model.layers.0.mlp.up_proj.weight", (64, 48), scheme="int8"),
            "do not divide 48",
        ),
        (weight("model.layers.0.self_attn.o_proj.bias", (128,)), "no place for"),
        (weight("model.layers.0.self_attn.secret", (128,)), "has no place in GGUF"),
        (weight("lm_head.weight", (384, 128), dtype="F64"), "no type for F64"),
        (
            weight("model.layers.1.mlp.experts.0.up_proj.weight", (128, 128), scheme="int4_g32"),
            "expert 1 is missing",
        ),
    ],
)
def test_weights_without_a_place_or_type_are_refused(stored: Weight, reason: str, tmp_path: Path) -> None:
    config = {**CONFIGS["deepseek_v3"], "attention_bias": True}
    refusal = TARGET.refuses(Contents(detect(config), config, (stored,), tmp_path, "dense"))
    assert refusal is not None
    assert reason in refusal


def test_without_the_package_the_error_says_how_to_install_it(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(writer, "import_module", missing)
    stored = StoredWeights(Reader(open_checkpoint(checkpoints["llama"])))
    with pytest.raises(ArtifactError, match=r"pip install 'quantlab\[gguf\]'"):
        writer.write(stored, contents_of(stored.reader.checkpoint), tmp_path, lambda _: None)
    assert np.array_equal(sorted(tmp_path.iterdir()), [])
