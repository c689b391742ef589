"""Models of a hub on the loopback, read by huggingface_hub's own client: headers by ranges, errors told, shards streamed."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantlab.checkpoint.hub import HubShards, open_hub_model
from quantlab.checkpoint.index import open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.errors import CheckpointError
from tests.checkpoints import make_checkpoint
from tests.fake_model_hub import COMMIT, Fault, Hub, Repo, running, use


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hub") / "model", "deepseek_v3")


@pytest.fixture
def hub(tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(tmp_path / "uploads") as hub:
        use(hub, tmp_path, monkeypatch)
        hub.repos["org/tiny"] = Repo(directory)
        yield hub


def test_opening_reads_headers_and_downloads_no_weights(hub: Hub, directory: Path) -> None:
    opened, local = open_hub_model("org/tiny", revision=None), open_checkpoint(directory)
    assert opened.fingerprint() == local.fingerprint()
    assert opened.config == local.config
    assert opened.shards.commit == COMMIT
    assert not list(opened.directory.glob("*.safetensors"))
    for request in hub.asked(r"\.safetensors$", "GET"):
        assert "bytes=0-" in request.headers.get("Range", request.headers.get("range", "")), request
    assert not [request for request in hub.asked("/cdn/") if "Authorization" in request.headers]


def test_a_second_opening_asks_for_no_header(hub: Hub) -> None:
    open_hub_model("org/tiny", revision="main")
    hub.requests.clear()
    opened = open_hub_model("org/tiny", revision=COMMIT)
    assert len(opened.tensors) > 100
    assert not hub.asked(r"\.safetensors$")


@pytest.mark.parametrize("offline", ["variable", "no connection"])
def test_what_was_opened_once_opens_without_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, offline: str) -> None:
    from huggingface_hub import close_session, constants

    before = open_hub_model("org/tiny", revision=None)
    hub.requests.clear()
    if offline == "variable":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    close_session()
    assert open_hub_model("org/tiny", revision=None).tensors == before.tensors
    assert not hub.requests


def test_offline_without_a_cache_says_what_to_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(CheckpointError, match="not in the hub's cache, and HF_HUB_OFFLINE is set") as caught:
        open_hub_model("org/tiny", revision=None)
    assert "unset HF_HUB_OFFLINE" in (caught.value.fix or "")
    assert not hub.requests


def test_an_unreachable_hub_is_told_after_some_attempts(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="cannot be reached") as caught:
        open_hub_model("org/tiny", revision=None)
    assert "attempts" in (caught.value.found or "")
    assert "http://127.0.0.1:9" in (caught.value.fix or "")


def test_gated_private_missing_and_renamed_models_end_in_advice(
    hub: Hub, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["org/gated"] = Repo(directory, gated=True)
    hub.repos["org/private"] = Repo(directory, private=True)
    hub.renamed["org/old"] = "org/tiny"
    for name, what, fix in (
        ("org/gated", "gated: its owner asks for your agreement", "HF_TOKEN"),
        ("org/private", "no such model, or it is private", "HF_TOKEN"),
        ("org/none", "no such model, or it is private", "correct the id"),
        ("org/old", "another name now", "write `model: org/tiny`"),
    ):
        hub.requests.clear()
        with pytest.raises(CheckpointError, match=what) as caught:
            open_hub_model(name, revision=None)
        assert fix in (caught.value.fix or "")
        assert len(hub.requests) < 12, "what does not pass is not tried again"
    with pytest.raises(CheckpointError, match="no such revision"):
        open_hub_model("org/tiny", revision="v9")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert open_hub_model("org/gated", revision=None).tensors
    assert open_hub_model("org/private", revision=None).tensors


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_faults_are_tried_again(hub: Hub, status: int) -> None:
    hub.faults = [Fault(r"/api/models/org/tiny$", 1, status), Fault(r"/cdn/.*00002", 2, status)]
    assert open_hub_model("org/tiny", revision=None).tensors
    assert not [fault for fault in hub.faults if fault.times]


def test_a_broken_connection_is_tried_again(hub: Hub, directory: Path) -> None:
    hub.faults = [Fault(r"/cdn/.*00001", 2, cut_after=1000)]
    assert open_hub_model("org/tiny", revision=None).fingerprint() == open_checkpoint(directory).fingerprint()
    assert hub.faults[0].times == 0


def test_faults_that_stay_are_told(hub: Hub) -> None:
    hub.faults = [Fault(r"/cdn/.*00003", 99, 503)]
    with pytest.raises(CheckpointError, match="the hub answers with an error") as caught:
        open_hub_model("org/tiny", revision=None)
    assert "00003" in (caught.value.where or "")
    assert "503" in (caught.value.found or "")
    assert hub.faults[0].times == 99 - 5
    hub.faults = [Fault(r"/api/models", 99, 429, headers={"Retry-After": "0"})]
    with pytest.raises(CheckpointError, match="refuses further requests"):
        open_hub_model("org/tiny", revision=None)


def test_a_hub_without_ranges_is_refused_before_it_sends_a_shard(hub: Hub) -> None:
    hub.faults = [Fault(r"/cdn/", 99, 200)]
    with pytest.raises(CheckpointError, match="does not serve parts of files"):
        open_hub_model("org/tiny", revision=None)


def test_a_long_header_takes_a_second_request(hub: Hub, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantlab.checkpoint.hub._FIRST_BYTES", 100)
    assert open_hub_model("org/tiny", revision=None).fingerprint() == open_checkpoint(directory).fingerprint()
    assert len(hub.asked(r"/cdn/.*00001", "GET")) == 2


def test_tensors_are_those_of_the_directory(hub: Hub, directory: Path) -> None:
    here, there = Reader(open_checkpoint(directory)), Reader(open_hub_model("org/tiny", revision=None))
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert here.read(name).equal(there.read(name))
    cached = there.checkpoint.directory
    assert cached.is_relative_to(Path(os.environ["XDG_CACHE_HOME"]).parent / "hf")


def test_a_download_goes_on_where_it_was_cut(hub: Hub, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 15)  # what is written at a time: 10 MB
    shards = open_hub_model("org/tiny", revision=None).shards
    assert isinstance(shards, HubShards)
    name = "model-00001-of-000004.safetensors"
    size = (directory / name).stat().st_size
    hub.requests.clear()
    hub.faults = [Fault(r"/cdn/", 1, cut_after=size // 2 // 65536 * 65536)]
    assert shards.path(name).read_bytes() == (directory / name).read_bytes()
    assert hub.sent < size + 65536, "the first half came once"


def test_another_file_under_the_name_of_a_shard_is_refused(hub: Hub, directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    hub.repos["org/tiny"] = Repo(copy)
    shards = open_hub_model("org/tiny", revision=None).shards
    first, second = sorted(copy.glob("*.safetensors"))[:2]
    shutil.copy(second, first)
    with pytest.raises(CheckpointError, match="not the one whose header was read"):
        shards.path(first.name)
    assert not shards.is_here(first.name)


def test_an_index_that_names_a_missing_shard_is_told(hub: Hub, directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    sorted(copy.glob("*.safetensors"))[-1].unlink()
    hub.repos["org/tiny"] = Repo(copy)
    with pytest.raises(CheckpointError, match="a shard is missing"):
        open_hub_model("org/tiny", revision=None)
    (copy / "config.json").write_text(json.dumps({"model_type": "llama"}))
