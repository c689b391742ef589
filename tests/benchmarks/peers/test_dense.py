"""What the judge reads in artifacts, against numbers packed by hand, bit by bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.benchmarks.peers.dense import compare, dequantize, role_of

ROWS, COLUMNS, GROUP = 16, 64, 32
NAME = "model.layers.1.mlp.experts.3.up_proj"


@pytest.fixture
def integers() -> list[list[int]]:
    """A matrix of numbers from -8 to 7, all of them there."""
    return [[(3 * row + 5 * column) % 16 - 8 for column in range(COLUMNS)] for row in range(ROWS)]


def words(numbers: list[int]) -> list[int]:
    """Unsigned numbers of 4 bits, eight to a signed word of 32, the first lowest."""
    packed = [
        sum(number << (4 * place) for place, number in enumerate(numbers[at : at + 8]))
        for at in range(0, len(numbers), 8)
    ]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in packed]


def write(directory: Path, tensors: dict[str, Tensor], quantization: dict[str, object]) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(
        tensors | {"model.norm.weight": torch.full((4,), 1.5, dtype=torch.bfloat16)}, directory / "model.safetensors"
    )
    (directory / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return directory


def expected(integers: list[list[int]], scale: list[list[float]], group_of: list[int]) -> Tensor:
    """Product by product, in the float32 of the file's numbers."""
    return torch.tensor(
        [
            [number * scale[row][group_of[column]] for column, number in enumerate(numbers)]
            for row, numbers in enumerate(integers)
        ],
        dtype=torch.float64,
    ).float()


@pytest.mark.parametrize("in_order", [True, False])
def test_gptq_is_decoded_as_it_was_packed(integers: list[list[int]], in_order: bool, tmp_path: Path) -> None:
    """Zero points that differ by group and row, and groups that are not in order, as act-order writes them."""
    groups = COLUMNS // GROUP
    group_of = [column // GROUP if in_order else (column * 7 // 3) % groups for column in range(COLUMNS)]
    scale = (torch.rand(groups, ROWS) * 0.1).half()
    zero = [[7 + (group + row) % 3 for row in range(ROWS)] for group in range(groups)]  # 7 to 9, stored less one
    unsigned = [[integers[row][column] + 8 for row in range(ROWS)] for column in range(COLUMNS)]
    columns = [words([unsigned[column][row] for column in range(COLUMNS)]) for row in range(ROWS)]
    tensors = {
        f"{NAME}.qweight": torch.tensor(columns, dtype=torch.int32).T.contiguous(),
        f"{NAME}.qzeros": torch.tensor([words([value - 1 for value in row]) for row in zero], dtype=torch.int32),
        f"{NAME}.scales": scale,
        f"{NAME}.g_idx": torch.tensor(group_of, dtype=torch.int32),
    }
    found, quantized = dequantize(write(tmp_path / "gptq", tensors, {"quant_method": "gptq", "bits": 4}))
    shifted = [
        [integers[row][column] + 8 - zero[group_of[column]][row] for column in range(COLUMNS)] for row in range(ROWS)
    ]
    assert torch.equal(found[f"{NAME}.weight"], expected(shifted, scale.float().T.tolist(), group_of))
    assert quantized == {f"{NAME}.weight"}
    assert torch.equal(found["model.norm.weight"], torch.full((4,), 1.5))


def test_compressed_tensors_is_multiplied_in_float32(integers: list[list[int]], tmp_path: Path) -> None:
    """An integer of three bits times a scale of eight has more bits than bfloat16 keeps."""
    group_of = [column // GROUP for column in range(COLUMNS)]
    scale = (torch.rand(ROWS, COLUMNS // GROUP) * 0.1).bfloat16()
    tensors = {
        f"{NAME}.weight_packed": torch.tensor([words([n + 8 for n in row]) for row in integers], dtype=torch.int32),
        f"{NAME}.weight_scale": scale,
        f"{NAME}.weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    found, quantized = dequantize(write(tmp_path / "packed", tensors, quantization))
    wanted = expected(integers, scale.float().tolist(), group_of)
    assert not torch.equal(wanted, wanted.bfloat16().float())
    assert torch.equal(found[f"{NAME}.weight"], wanted)
    assert quantized == {f"{NAME}.weight"}


def test_missing_and_changed_tensors_are_reported() -> None:
    expert, norm, router = f"{NAME}.weight", "model.norm.weight", "model.layers.1.mlp.gate.weight"
    reference = {expert: torch.ones(2, 2), norm: torch.ones(2), router: torch.ones(2, 2)}
    same = compare(dict(reference), set(), reference)
    assert same["modules"] == {"routed experts": {"quantized": 0, "not": 1}, "router": {"quantized": 0, "not": 1}}
    assert same["missing"] == same["unknown"] == same["changed"] == []
    other = {expert: torch.zeros(2, 2), norm: torch.zeros(2), "stranger": torch.ones(1)}
    found = compare(other, {expert}, reference)
    assert found["modules"] == {"routed experts": {"quantized": 1, "not": 0}}
    assert (found["missing"], found["unknown"], found["changed"]) == ([router], ["stranger"], [norm])


@pytest.mark.parametrize(
    ("name", "role"),
    [
        (NAME, "routed experts"),
        ("model.layers.1.mlp.shared_experts.up_proj", "shared experts"),
        ("model.layers.1.mlp.gate.weight", "router"),
        ("model.layers.0.mlp.gate_proj.weight", "dense MLP"),
        ("model.layers.0.self_attn.kv_b_proj.weight", "kv_b_proj"),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "attention"),
        ("lm_head.weight", "embeddings and head"),
    ],
)
def test_roles(name: str, role: str) -> None:
    assert role_of(name) == role
