"""Hidden states have the same values in memory and in files, and are found again after a restart."""

import errno
import os
from pathlib import Path

import pytest
import torch

from quantlab.calibration.collect import Stream, collect
from quantlab.calibration.hidden import HiddenStates, Workspace, discard_streams, load_streams, save_streams
from quantlab.calibration.moe import collect_moe
from quantlab.errors import ArtifactError, CheckpointError
from tests.calibration.conftest import Whole
from tests.calibration.oracle import CPU, embedded, filled, skeleton_of, through


def stream(
    directory: Path, *, memory: int = 1 << 20, seed: int = 0, dtype: torch.dtype = torch.float32
) -> HiddenStates:
    made = Workspace(directory, memory_bytes=memory, device=CPU, tokens_at_once=10).stream(5, 4, 8, dtype=dtype)
    made.write(slice(0, 5), torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(seed)))
    return made


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_reading_and_replacing(tmp_path: Path, memory: int) -> None:
    made = stream(tmp_path, memory=memory)
    assert made.spilled == (memory == 0)
    assert made.shape == (5, 4, 8)
    assert made.tokens == 20
    batches = list(made.batches())
    assert [(which.start, which.stop) for which, _ in batches] == [(0, 2), (2, 4), (4, 5)]
    everything = torch.cat([batch for _, batch in batches])
    assert torch.equal(made.rows(torch.tensor([0, 7, 19])), everything.flatten(0, 1)[[0, 7, 19]])
    made.write(slice(2, 4), torch.zeros(2, 4, 8))
    assert not made.read(slice(2, 4)).any()
    assert torch.equal(made.read(slice(4, 5)), everything[4:])
    assert not list(tmp_path.iterdir())


def test_a_sample_longer_than_a_batch_is_a_batch(tmp_path: Path) -> None:
    made = Workspace(tmp_path, memory_bytes=1 << 20, device=CPU, tokens_at_once=3).stream(2, 4, 8, dtype=torch.float32)
    assert [which.stop - which.start for which, _ in made.batches()] == [1, 1]


def test_the_cap_counts_all_streams_that_are_held(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, memory_bytes=1500, device=CPU)
    first = workspace.stream(5, 4, 8, dtype=torch.float32)  # 640 bytes
    second = workspace.stream(5, 4, 8, dtype=torch.float32)
    third = workspace.stream(5, 4, 8, dtype=torch.float32)
    assert [made.spilled for made in (first, second, third)] == [False, False, True]
    del second
    assert not workspace.stream(5, 4, 8, dtype=torch.float32).spilled


def test_spilled_and_in_memory_agree_in_every_bit(whole: Whole, tmp_path: Path) -> None:
    skeleton = skeleton_of(whole.source)
    results = []
    for memory in (0, 1 << 30):
        hidden = embedded(skeleton, whole.weights, tmp_path, memory=memory)
        assert hidden.spilled == (memory == 0)
        through(filled(skeleton, 0, whole.weights), hidden)
        half = filled(skeleton, 1, whole.weights).mlp
        found = [
            hidden.read(slice(None)).clone(),
            collect(Stream(half, hidden), ["down"], needs=["hessian"])["down"].hessian,
        ]
        if half.experts is not None:
            moe = collect_moe(Stream(half, hidden), needs=["hessian"])
            found += [moe.layer.hessian, moe.statistics(3, ["hessian"]).hessian]
        results.append(found)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_save_and_load(tmp_path: Path, dtype: torch.dtype, memory: int) -> None:
    saved = {"changed": stream(tmp_path, seed=1, dtype=dtype), "original": stream(tmp_path, seed=2, dtype=dtype)}
    save_streams(tmp_path, "layer 3", saved)
    loaded = {name: stream(tmp_path, memory=memory, dtype=dtype) for name in saved}
    load_streams(tmp_path, "layer 3", loaded)
    for name in saved:
        assert torch.equal(saved[name].read(slice(None)), loaded[name].read(slice(None)))


def test_older_streams_stay_until_they_are_discarded(tmp_path: Path) -> None:
    for block, seed in (("layer 0", 1), ("layer 1", 2)):
        save_streams(tmp_path, block, {"changed": stream(tmp_path, seed=seed)})
    for block, seed in (("layer 0", 1), ("layer 1", 2)):
        loaded = stream(tmp_path)
        load_streams(tmp_path, block, {"changed": loaded})
        assert torch.equal(loaded.read(slice(None)), stream(tmp_path, seed=seed).read(slice(None)))
    (tmp_path / "hidden-after-layer-2.safetensors.tmp").touch()
    discard_streams(tmp_path, keep="layer 1")
    assert [path.name for path in tmp_path.iterdir()] == ["hidden-after-layer-1.safetensors"]
    discard_streams(tmp_path, keep=None)
    assert not list(tmp_path.iterdir())


def test_streams_of_another_calibration_are_refused(tmp_path: Path) -> None:
    save_streams(tmp_path, "layer 0", {"changed": stream(tmp_path)})
    other = Workspace(tmp_path, memory_bytes=1 << 20, device=CPU).stream(5, 4, 16, dtype=torch.float32)
    with pytest.raises(ArtifactError, match="belong to another calibration") as problem:
        load_streams(tmp_path, "layer 0", {"changed": other})
    assert "expected {'changed': ('F32', (5, 4, 16))}" in str(problem.value)


def test_saved_streams_that_are_gone_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load_streams(tmp_path, "layer 0", {"changed": stream(tmp_path)})
    save_streams(tmp_path, "layer 0", {"changed": stream(tmp_path)})
    path = tmp_path / "hidden-after-layer-0.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        load_streams(tmp_path, "layer 0", {"changed": stream(tmp_path)})


def test_a_failed_save_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_streams(tmp_path, "layer 0", {"changed": stream(tmp_path, seed=1)})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="cannot be written"):
        save_streams(tmp_path, "layer 1", {"changed": stream(tmp_path, seed=2)})
    assert [path.name for path in tmp_path.iterdir()] == ["hidden-after-layer-0.safetensors"]


def test_a_full_disk_is_reported_and_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, start: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ArtifactError, match="hidden states of the calibration cannot be written to disk") as problem:
        stream(tmp_path, memory=0)
    assert "No space left on device; 0.0 GB needed" in str(problem.value)
    assert not list(tmp_path.iterdir())
