"""The GPTQ layouts against an independent decoder, and the checkpoints that are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantlab.algorithms.rtn import rtn
from quantlab.checkpoint.header import TensorEntry
from quantlab.checkpoint.reader import DTYPE_NAMES
from quantlab.errors import ArtifactError
from quantlab.formats.codecs.table import CODECS
from quantlab.formats.gptq import FIRST, SECOND, GptqConfig, parse_config
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.number_format import INT4, NumberFormat
from quantlab.numerics.number_format import group as group_of
from quantlab.recipe.schemes import LayoutName
from tests.benchmarks.peers.dense import GPTQ_PARTS, decode_gptq

NUMBERS = [(bits, group) for bits in (4, 8) for group in (None, 32, 64, 128)]


def described(**changes: object) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True} | changes


def entries(stored: dict[str, Tensor], tmp_path: Any) -> dict[str, TensorEntry]:
    return {name: TensorEntry(name, DTYPE_NAMES[t.dtype], tuple(t.shape), tmp_path, 0) for name, t in stored.items()}


def matrix(bits: int, group: int | None) -> QuantizedMatrix:
    torch.manual_seed(bits)
    grid = "signed" if bits == 4 else "absmax"
    return rtn(torch.randn(64, 256) * 0.02, bits=bits, group_size=group, scale_dtype=torch.float16, grid=grid)


def decoded(stored: dict[str, Tensor], config: GptqConfig, tmp_path: Any) -> QuantizedMatrix:
    found = config.stored("m.weight", entries(stored, tmp_path))
    assert found is not None
    return CODECS[found.layout].decode("m.weight", stored, found.number)


def encode(name: str, matrix: QuantizedMatrix) -> dict[str, Tensor]:
    """Encode in the first layout ("gptq")."""
    codec = CODECS["gptq"]
    assert codec.encode is not None
    return codec.encode(name, matrix)


@pytest.mark.parametrize(("bits", "group"), NUMBERS)
def test_an_independent_decoder_reads_what_is_encoded(bits: int, group: int | None) -> None:
    wanted = matrix(bits, group)
    assert {int(wanted.q.min()), int(wanted.q.max())} & {-(2 ** (bits - 1)), 2 ** (bits - 1) - 1}, (
        "the grid's ends occur"
    )
    stored = encode("m.weight", wanted)
    found = decode_gptq(*(stored[f"m.{part}"] for part in GPTQ_PARTS), bits=bits)
    scale = wanted.scale.float().repeat_interleave(256 // wanted.scale.shape[1], dim=1)
    assert torch.equal(found, wanted.q.float() * scale)
    assert [stored[f"m.{part}"].dtype for part in GPTQ_PARTS] == [torch.int32, torch.int32, torch.float16, torch.int32]


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize(("bits", "group"), NUMBERS)
def test_round_trip_of_both_formats(bits: int, group: int | None, layout: str | None, tmp_path: Any) -> None:
    wanted = matrix(bits, group)
    stored = encode("m.weight", wanted)
    if layout == "gptq_v2":  # adds one to every zero point: one in every field of the words
        stored["m.qzeros"] += 0x11111111 if bits == 4 else 0x01010101
    config = parse_config(described(bits=bits, group_size=group or -1, checkpoint_format=layout), where="config.json")
    described_as = config.stored("m.weight", entries(stored, tmp_path))
    assert described_as is not None
    number = described_as.number
    assert (number.bits, number.group_size, number.activations, number.symmetric) == (bits, group, None, True)
    found = CODECS[described_as.layout].decode("m.weight", stored, number)
    assert torch.equal(found.q, wanted.q)
    assert torch.equal(found.scale, wanted.scale)


def test_zero_points_of_the_other_format_are_refused(tmp_path: Any) -> None:
    stored = encode("m.weight", matrix(4, 128))
    with pytest.raises(ArtifactError, match="asymmetrically"):
        decoded(stored, parse_config(described(checkpoint_format="gptq_v2"), where="here"), tmp_path)
    stored["m.qzeros"][1, 3] ^= 0x40  # one zero point of one group
    with pytest.raises(ArtifactError, match=r"asymmetrically[^$]*sym=True"):
        decoded(stored, parse_config(described(), where="here"), tmp_path)


def test_columns_out_of_order_are_refused_and_missing_indices_are_not(tmp_path: Any) -> None:
    config = parse_config(described(desc_act=True), where="here")
    stored = encode("m.weight", matrix(4, 128))
    assert torch.equal(decoded(stored, config, tmp_path).q, matrix(4, 128).q), "desc_act alone is no obstacle"
    stored["m.g_idx"] = stored["m.g_idx"].flip(0).contiguous()
    with pytest.raises(ArtifactError, match=r"ordered by activation[^$]*desc_act=False"):
        decoded(stored, config, tmp_path)
    del stored["m.g_idx"]
    assert torch.equal(decoded(stored, config, tmp_path).q, matrix(4, 128).q)


def asymmetric_matrix() -> QuantizedMatrix:
    torch.manual_seed(7)
    W = torch.randn(64, 256) * 0.02 + 0.02 * torch.randn(64, 1)
    found = rtn(W, bits=4, group_size=32, scale_dtype=torch.float16, grid="minmax")
    assert found.zero is not None
    assert len(found.zero.unique()) > 4
    return found


def test_zero_points_survive_in_the_second_layout(tmp_path: Any) -> None:
    wanted, codec = asymmetric_matrix(), CODECS["gptq_v2"]
    assert codec.encode is not None
    stored = codec.encode("m.weight", wanted)
    config = parse_config(described(group_size=32, sym=False, checkpoint_format="gptq_v2"), where="here")
    found = decoded(stored, config, tmp_path)
    assert found.zero is not None
    assert torch.equal(found.q, wanted.q)
    assert torch.equal(found.zero, wanted.zero)
    assert torch.equal(found.scale, wanted.scale)
    del stored["m.qzeros"]
    with pytest.raises(ArtifactError, match=r"contradict[^$]*no m.qzeros"):
        decoded(stored, config, tmp_path)
    asymmetric = NumberFormat(INT4, group_of(32), symmetric=False)
    assert "gptq_v2" in (FIRST.can_express(asymmetric) or "")
    assert SECOND.can_express(asymmetric) is None


GOLDEN = Path(__file__).parent / "golden" / "gptqmodel.safetensors"


@pytest.mark.parametrize(("case", "layout"), [("int4_g32", "gptq"), ("int8_row", "gptq"), ("int4_g32_asym", "gptq_v2")])
def test_what_gptqmodel_packed_is_read_and_written_bit_for_bit(case: str, layout: str, tmp_path: Any) -> None:
    """The file was made by golden/with_gptqmodel.py."""
    golden = {name.removeprefix(f"{case}."): t for name, t in load_file(GOLDEN).items() if name.startswith(f"{case}.")}
    packed = {f"m.{part}": golden[part] for part in GPTQ_PARTS}
    bits, size = (8, -1) if case == "int8_row" else (4, 32)
    config = parse_config(
        described(bits=bits, group_size=size, sym=layout == "gptq", checkpoint_format=layout), where="here"
    )
    found = decoded(packed, config, tmp_path)
    middle = 1 << (bits - 1)
    assert torch.equal(found.q.int() + middle, golden["q"].int())
    assert torch.equal(found.scale.float(), golden["scale"])
    zero = torch.zeros_like(golden["zero"], dtype=torch.int32) if found.zero is None else found.zero.int()
    assert torch.equal(zero + middle, golden["zero"].int())
    codec = CODECS[found_layout(layout)]
    assert codec.encode is not None
    again = codec.encode("m.weight", found)
    assert set(again) == set(packed)
    for name, tensor in packed.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor), name


def found_layout(word: str) -> LayoutName:
    return "gptq" if word == "gptq" else "gptq_v2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "3 bits in groups of 128"),
        ({"bits": None}, "bits None"),
        ({"group_size": 100}, "4 bits in groups of 100"),
        ({"group_size": "wide"}, "'wide'"),
        ({"checkpoint_format": "marlin"}, "'marlin'"),
        ({"is_marlin_format": True}, "marlin"),
    ],
)
def test_unsupported_gptq_configs_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        parse_config(described(**change), where="config.json")


@pytest.mark.parametrize("change", [{"bits": 8}, {"group_size": 64}, {"group_size": -1}])
def test_a_description_of_other_numbers_is_refused(change: dict, tmp_path: Any) -> None:
    stored = encode("m.weight", matrix(4, 128))
    with pytest.raises(ArtifactError, match=r"contradict[^$]*4 bits in 2 groups"):
        decoded(stored, parse_config(described(**change), where="here"), tmp_path)


def test_parts_that_do_not_fit_are_refused(tmp_path: Any) -> None:
    config = parse_config(described(), where="here")
    whole = encode("m.weight", matrix(4, 128))
    for broken in ({"m.scales": whole["m.scales"][:, :32]}, {"m.qzeros": whole["m.qzeros"][:1]}):
        with pytest.raises(ArtifactError, match="contradict"):
            decoded(whole | broken, config, tmp_path)
    with pytest.raises(ArtifactError, match=r"contradict[^$]*missing"):
        decoded({name: t for name, t in whole.items() if name != "m.scales"}, config, tmp_path)
