"""Damaged checkpoint directories, and the error for each kind of damage."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlab.architectures.detect import detect
from quantlab.checkpoint.header import read_header
from quantlab.checkpoint.index import open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.errors import CheckpointError
from quantlab.formats.layouts import description_of, method_of
from quantlab.plan.source import survey
from tests.checkpoints import CONFIGS

INDEX = "model.safetensors.index.json"
Damage = Callable[[Path], None]


def _first_shard(directory: Path) -> Path:
    return sorted(directory.glob("*.safetensors"))[0]


def _edit_json(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _edit_shard(directory: Path, change: Callable[[dict], None]) -> None:
    """Change the tensors of the shard that contains a given name, and update the index."""
    for path in sorted(directory.glob("*.safetensors")):
        tensors = load_file(path)
        before = set(tensors)
        change(tensors)
        if tensors:
            save_file(tensors, path)

        def follow(
            index: dict,
            path: Path = path,
            gone: set[str] = before - set(tensors),
            new: set[str] = set(tensors) - before,
        ) -> None:
            for name in gone:
                index["weight_map"].pop(name, None)
            index["weight_map"].update(dict.fromkeys(new, path.name))

        _edit_json(directory / INDEX, follow)


def _rewrite_header(directory: Path, change: Callable[[dict], None]) -> None:
    path = _first_shard(directory)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _overlap(header: dict) -> None:
    names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    start, end = header[names[1]]["data_offsets"]
    header[names[1]]["data_offsets"] = [start - 2, end - 2]


def _shift_range(header: dict) -> None:
    name = next(n for n in header if n != "__metadata__")
    header[name]["data_offsets"][1] += 2


def _unknown_dtype(header: dict) -> None:
    header[next(n for n in header if n != "__metadata__")]["dtype"] = "F6"


def _drop(name: str) -> Callable[[dict], None]:
    return lambda tensors: tensors.pop(name, None)


def _replace(name: str, shape: tuple[int, ...]) -> Callable[[dict], None]:
    def change(tensors: dict) -> None:
        if name in tensors:
            tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)

    return change


def _pickle_only(directory: Path) -> None:
    for path in (*directory.glob("*.safetensors"), directory / INDEX):
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _remove_weights(directory: Path) -> None:
    for path in (*directory.glob("*.safetensors"), directory / INDEX):
        path.unlink()


def _two_sets(directory: Path) -> None:
    tensors = {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}
    save_file(tensors, directory / "model.safetensors")


def _adapter_only(directory: Path) -> None:
    _remove_weights(directory)
    (directory / "config.json").unlink()
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(2, 2)}, directory / "adapter_model.safetensors")


def _foreign_name(directory: Path) -> None:
    _remove_weights(directory)
    save_file({"w": torch.zeros(2, 2)}, directory / "consolidated.safetensors")


def _shard_of(number: int) -> Damage:
    def inflict(directory: Path) -> None:
        (directory / INDEX).unlink()
        sorted(directory.glob("*.safetensors"))[number].unlink()

    return inflict


def _shard_twice(directory: Path) -> None:
    (directory / INDEX).unlink()
    shutil.copy(_first_shard(directory), directory / "model-1-of-000004.safetensors")


def _tensor_twice(directory: Path) -> None:
    first, second = sorted(directory.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second)


def _dangling(name: str) -> Damage:
    def inflict(directory: Path) -> None:
        path = directory / name
        path.unlink()
        path.symlink_to(directory / "blobs" / "0123")

    return inflict


def _pointer(directory: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123\n"
    _first_shard(directory).write_text(pointer)


DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"
DAMAGES: dict[str, tuple[Damage, str, str]] = {
    "no directory": (shutil.rmtree, "the checkpoint directory does not exist", "give the path"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json cannot be read", "Hugging Face checkpoint"),
    "config no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON", "download"),
    "no weights": (_remove_weights, "the directory contains no safetensors files", "download the weights"),
    "pickle": (_pickle_only, "only safetensors files are supported", "save_pretrained"),
    "index and another single file": (_two_sets, "two sets of weights: model.safetensors, and the shards of model.safetensors.index.json", "delete one of them"),
    "adapter": (_adapter_only, "an adapter (LoRA), not a model", "merge it into its base model"),
    "weights under another name": (_foreign_name, "not those of a model", "rename"),
    "no index, a shard missing": (_shard_of(2), "shards are missing, and there is no index", "download the missing shards"),
    "no index, the last shard missing": (_shard_of(3), "shards are missing, and there is no index", "download the missing shards"),
    "no index, a shard twice": (_shard_twice, "shards are missing, and there is no index", "download"),
    "a tensor twice": (_tensor_twice, "two shards hold the same tensor", "one release"),
    "no index, a tensor twice": (lambda d: (_tensor_twice(d), (d / INDEX).unlink()), "two shards hold the same tensor, and there is no index", "download the index"),
    "link of a shard to nothing": (_dangling("model-00002-of-000004.safetensors"), "a link to a file that does not exist", "download the checkpoint again"),
    "link of the index to nothing": (_dangling(INDEX), "a link to a file that does not exist", "download the checkpoint again"),
    "link of the config to nothing": (_dangling("config.json"), "a link to a file that does not exist", "download the checkpoint again"),
    "pointer of Git LFS": (_pointer, "a pointer of Git LFS", "download"),
    "missing shard": (lambda d: _first_shard(d).unlink(), "a shard is missing", "download the shard"),
    "truncated shard": (lambda d: _first_shard(d).write_bytes(_first_shard(d).read_bytes()[:-7]), "a shard is truncated", "download the shard again"),
    "empty shard": (lambda d: _first_shard(d).write_bytes(b""), "its header is longer than the file", "download"),
    "header too long": (lambda d: _first_shard(d).write_bytes((10**15).to_bytes(8, "little") + b"{}"), "its header is longer than the file", "download"),
    "header no JSON": (lambda d: _first_shard(d).write_bytes((4).to_bytes(8, "little") + b"abcd"), "its header is not JSON", "download"),
    "overlapping offsets": (lambda d: _rewrite_header(d, _overlap), "overlaps the tensor before it", "download"),
    "range and shape differ": (lambda d: _rewrite_header(d, _shift_range), "does not fit its shape", "download"),
    "unknown dtype": (lambda d: _rewrite_header(d, _unknown_dtype), "unknown dtype", "known: F64"),
    "bytes at the end": (lambda d: _first_shard(d).write_bytes(_first_shard(d).read_bytes() + b"xx"), "bytes follow the last tensor", "download"),
    "index outside": (lambda d: _edit_json(d / INDEX, lambda i: i["weight_map"].update({DOWN: "../evil.safetensors"})), "names a file outside the checkpoint", "in the directory of the index"),
    "index without map": (lambda d: (d / INDEX).write_text("{}"), "no usable weight_map", "download the index"),
    "index names a ghost": (lambda d: _edit_json(d / INDEX, lambda i: i["weight_map"].update(ghost=_first_shard(d).name)), "missing from its shard", "download the shard"),
    "index forgets a tensor": (lambda d: _edit_json(d / INDEX, lambda i: i["weight_map"].pop(DOWN)), "a tensor that the index does not list", "one release"),
    "tensor missing": (lambda d: _edit_shard(d, _drop("model.layers.2.input_layernorm.weight")), "a tensor is missing", "complete checkpoint"),
    "wrong shape": (lambda d: _edit_shard(d, _replace("lm_head.weight", (384, 64))), "a tensor has the wrong shape", "one release"),
    "scale missing": (lambda d: _edit_shard(d, _drop(DOWN + "_scale_inv")), "an FP8 weight has no scale", "complete checkpoint"),
    "scale of wrong shape": (lambda d: _edit_shard(d, _replace(DOWN + "_scale_inv", (2, 1))), "a scale does not fit its weight", "download the shard"),
    "scale of nothing": (lambda d: _edit_shard(d, lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(3, 1)}) if "lm_head.weight" in t else None), "a scale belongs to no FP8 weight", "one release"),
    "no block size": (lambda d: _edit_json(d / "config.json", lambda c: c["quantization_config"].pop("weight_block_size")), "does not say its block size", "[128, 128]"),
    "unsupported architecture": (lambda d: _edit_json(d / "config.json", lambda c: c.update(architectures=["GPT2LMHeadModel"])), "the architecture is not supported", "LlamaForCausalLM"),
    "config lacks a size": (lambda d: _edit_json(d / "config.json", lambda c: c.pop("kv_lora_rank")), "no usable kv_lora_rank", "original release"),
    "quantization_config no mapping": (lambda d: _edit_json(d / "config.json", lambda c: c.update(quantization_config="fp8")), "no usable quantization_config", "original release"),
    "architectures no list": (lambda d: _edit_json(d / "config.json", lambda c: c.update(architectures=5)), "the architecture is not supported", "LlamaForCausalLM"),
    "moe_layer_freq 0": (lambda d: _edit_json(d / "config.json", lambda c: c.update(moe_layer_freq=0)), "no usable moe_layer_freq", "original release"),
    "too few layers": (lambda d: _edit_json(d / "config.json", lambda c: c.update(num_hidden_layers=1, num_nextn_predict_layers=0)), "layer or expert that config.json does not have", "one release"),
    "too few experts": (lambda d: _edit_json(d / "config.json", lambda c: c.update(n_routed_experts=4)), "a tensor has the wrong shape", "one release"),
    "absurd layers": (lambda d: _edit_json(d / "config.json", lambda c: c.update(num_hidden_layers=10**12)), "no usable num_hidden_layers", "original release"),
    "dtype no word": (lambda d: _rewrite_header(d, lambda h: h[next(n for n in h if n != "__metadata__")].update(dtype=[])), "unknown dtype", "known: F64"),
    "deep JSON": (lambda d: (d / INDEX).write_text('{"weight_map": ' + "[" * 100_000), "is not JSON", "download"),
    "another FP8": (lambda d: _edit_shard(d, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e5m2)}) if "lm_head.weight" in t else None), "a dtype quantlab does not read", "BF16"),
    "already quantized": (lambda d: _edit_json(d / "config.json", lambda c: c["quantization_config"].update(quant_method="gptq")), "the source is already quantized", "original BF16"),
}  # fmt: skip


def _open(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    survey(checkpoint, detect(checkpoint.config))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_located(damage: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    shutil.copytree(checkpoints["deepseek_v3"], directory)
    _open(directory)
    inflict, what, fix = DAMAGES[damage]
    inflict(directory)
    with pytest.raises(CheckpointError) as caught:
        _open(directory)
    error = caught.value
    assert what in error.what
    assert fix in (error.fix or "")
    assert error.found
    assert error.where


def test_reader_equals_safetensors(checkpoints: dict[str, Path]) -> None:
    for directory in checkpoints.values():
        reader = Reader(open_checkpoint(directory))
        for path in directory.glob("*.safetensors"):
            for name, tensor in load_file(path).items():
                read = reader.read(name)
                assert read.dtype == tensor.dtype
                assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


def test_file_that_shrinks_after_its_header_was_read(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["llama"], tmp_path / "c")
    reader = Reader(open_checkpoint(tmp_path / "c"))
    path = tmp_path / "c" / "model.safetensors"
    last = list(read_header(path))[-1]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        reader.read(last)


def test_every_family_is_claimed_completely(checkpoints: dict[str, Path]) -> None:
    assert set(checkpoints) == set(CONFIGS)
    for directory in checkpoints.values():
        checkpoint = open_checkpoint(directory)
        weights = survey(checkpoint, detect(checkpoint.config))
        assert {weight.tensor.role for weight in weights} & {"other"} == set()
        paired = sum(weight.scale is not None for weight in weights)
        assert len(weights) + paired == len(checkpoint.tensors)


def test_a_complete_set_of_shards_needs_no_index(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    whole = open_checkpoint(checkpoints["deepseek_v3"])
    directory = shutil.copytree(checkpoints["deepseek_v3"], tmp_path / "c")
    (directory / INDEX).unlink()
    checkpoint = open_checkpoint(directory)
    assert {n: (e.file.name, e.offset) for n, e in checkpoint.tensors.items()} == {
        n: (e.file.name, e.offset) for n, e in whole.tensors.items()
    }
    _open(directory)


def test_an_index_of_the_single_file_agrees_with_it(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoints["llama"], tmp_path / "c")
    names = open_checkpoint(directory).tensors
    (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    assert set(open_checkpoint(directory).tensors) == set(names)
    _open(directory)


@pytest.mark.parametrize(("number", "named"), [(0, "number 1"), (2, "number 3"), (3, "number 4")])
def test_missing_shards_are_numbered(number: int, named: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoints["deepseek_v3"], tmp_path / "c")
    _shard_of(number)(directory)
    with pytest.raises(CheckpointError, match=f"3 of 4 shards, without {named}"):
        _open(directory)


def test_a_description_of_packed_weights_beside_plain_ones_is_ignored(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """A quantize_config.json is left over from a conversion, or from another branch of the repository."""
    directory = shutil.copytree(checkpoints["llama"], tmp_path / "c")
    (directory / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    checkpoint = open_checkpoint(directory)
    assert method_of(checkpoint) is None
    assert description_of(checkpoint) is None
    _open(directory)
