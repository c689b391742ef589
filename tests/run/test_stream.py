"""Runs on a model of the hub: the same bytes as from a directory, within the budget of disk, and after an interruption."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from quantlab.checkpoint.hub import open_hub_model
from quantlab.checkpoint.index import INDEX_NAME, open_checkpoint
from quantlab.checkpoint.stream import ShardStream, Store
from quantlab.errors import CheckpointError, PlanError, RecipeError
from quantlab.plan.compile import compile_plan
from quantlab.recipe.load import load_recipe
from quantlab.run.directory import RunDirectory
from quantlab.run.execute import make_artifacts
from quantlab.run.loop import Settings
from quantlab.source import size_in_bytes
from tests.checkpoints import make_checkpoint
from tests.fake_model_hub import COMMIT, Fault, Hub, Repo, running, use

VARIANTS = "variants:\n  w4a16: [{quantize: int4_g128}]\n  int8: [{quantize: int8}]\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in eight shards, in the order of the layers as released ones are."""
    place = make_checkpoint(tmp_path_factory.mktemp("stream") / "model", "llama", sizes={"num_hidden_layers": 6})
    tensors = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    names = sorted(tensors, key=lambda name: (not name.startswith("model.embed"), name == "lm_head.weight", name))
    weight_map = {
        name: f"model-{1 + 8 * number // len(names):05d}-of-00008.safetensors" for number, name in enumerate(names)
    }
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, place / file)
    (place / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return place


@pytest.fixture
def hub(tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(tmp_path / "uploads") as hub:
        use(hub, tmp_path, monkeypatch)
        hub.repos["org/model"] = Repo(directory)
        yield hub


def _make(tmp_path: Path, name: str, text: str, model: Path | None, disk: int | None = None) -> RunDirectory:
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_text(text)
    loaded = load_recipe(recipe)
    checkpoint = open_hub_model("org/model", revision=None) if model is None else open_checkpoint(model)
    directory = RunDirectory(tmp_path / name)
    plan = compile_plan(loaded.recipe, checkpoint)
    make_artifacts(plan, loaded, directory, lambda _: lambda _: None, Settings(disk=disk))
    return directory


def _weights(directory: RunDirectory) -> dict[str, bytes]:
    return {str(path.relative_to(directory.path)): path.read_bytes() for path in directory.path.rglob("*.safetensors")}


@pytest.fixture
def expected(tmp_path: Path, directory: Path) -> dict[str, bytes]:
    return _weights(_make(tmp_path, "local", f"model: {directory}\n{VARIANTS}", directory))


class _Watched:
    """Sums of the sizes of the shards in a folder, with unfinished ones, whenever one is asked for or comes."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place, self.most, self.paths = place, 0, 0
        for name in ("path", "_next"):
            method = getattr(ShardStream, name)

            def wrapped(stream: ShardStream, *arguments: str, _method=method) -> object:
                result = _method(stream, *arguments)
                self.look()
                return result

            monkeypatch.setattr(ShardStream, name, wrapped)

    def look(self) -> None:
        self.paths += 1
        sizes = []
        for path in (*self.place.rglob("*.safetensors"), *self.place.rglob("*.incomplete")):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:
                continue
        self.most = max(self.most, sum(sizes))


def test_a_run_keeps_to_its_budget_and_makes_the_same_bytes(
    hub: Hub, tmp_path: Path, directory: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    total = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    budget = int(0.62 * total)
    watched = _Watched(tmp_path / "hub", monkeypatch)
    watched.place = tmp_path / "hub" / ".work" / "source"
    made = _make(tmp_path, "hub", f"model: org/model\nkeep_source: false\n{VARIANTS}", None, budget)
    assert _weights(made) == expected
    assert 0 < watched.most <= budget < total
    assert watched.paths > 16
    assert not (made.path / ".work").exists(), "shards are gone"
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    manifest = json.loads((made.artifact("w4a16") / "manifest.json").read_text())
    assert manifest["source"]["commit"] == COMMIT
    assert manifest["source"]["model"] == "org/model"


def test_without_a_budget_used_shards_are_deleted_once_no_variant_needs_them(
    hub: Hub, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    made = _make(tmp_path, "hub", f"model: org/model\nkeep_source: false\n{VARIANTS}", None)
    assert _weights(made) == expected
    assert len(hub.asked("/cdn/.*safetensors", "GET")) == 8 + 8, "a header and a file each, for both variants"


def test_a_kept_source_stays_in_the_cache_of_the_hub(hub: Hub, tmp_path: Path, expected: dict[str, bytes]) -> None:
    assert _weights(_make(tmp_path, "hub", f"model: org/model\n{VARIANTS}", None)) == expected
    assert len({path.resolve() for path in (tmp_path / "hf").rglob("*.safetensors")}) == 8
    hub.requests.clear()
    assert _weights(_make(tmp_path, "again", f"model: org/model\n{VARIANTS}", None)) == expected
    assert not hub.asked("/cdn/")


def test_an_interrupted_run_goes_on_and_fetches_no_shard_again(
    hub: Hub, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    recipe = f"model: org/model\nkeep_source: false\n{VARIANTS}"
    open_hub_model("org/model", revision=None)  # headers come before the fault
    hub.faults = [Fault(r"/cdn/.*00005", 99, 503)]
    monkey = pytest.MonkeyPatch()
    monkey.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with monkey.context(), pytest.raises(CheckpointError, match="00005"):
        _make(tmp_path, "hub", recipe, None)
    monkey.undo()
    assert not (tmp_path / "hub" / "artifacts").exists()
    left = {path.name for path in (tmp_path / "hub" / ".work" / "source").rglob("*.safetensors")}
    hub.faults.clear()
    hub.requests.clear()
    assert _weights(_make(tmp_path, "hub", recipe, None)) == expected
    again = {Path(request.path).name for request in hub.asked("/cdn/", "GET")}
    assert left
    assert not left & again


def test_a_partial_shard_of_an_earlier_run_is_not_used(hub: Hub, tmp_path: Path, expected: dict[str, bytes]) -> None:
    place = RunDirectory(tmp_path / "hub").source(COMMIT)
    place.mkdir(parents=True)
    (place / "model-00002-of-00008.safetensors").write_bytes(b"half")
    made = _make(tmp_path, "hub", f"model: org/model\nkeep_source: false\n{VARIANTS}", None)
    assert _weights(made) == expected


def test_a_budget_that_is_too_small_is_told_before_any_work(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="more disk than there is for it") as caught:
        _make(tmp_path, "hub", f"model: org/model\nkeep_source: false\n{VARIANTS}", None, 1000)
    assert "one block" in (caught.value.found or "")
    with pytest.raises(PlanError, match="more disk than there is for it") as caught:
        _make(tmp_path, "hub", f"model: org/model\n{VARIANTS}", None, 200_000)
    assert "keep_source: false" in (caught.value.fix or "")
    assert not (tmp_path / "hub" / "artifacts").exists()


def test_a_source_that_is_measured_is_kept(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: org/model\nkeep_source: false\n{VARIANTS}evaluate: {{suite: quick}}\n")
    with pytest.raises(RecipeError, match="`evaluate` measures the source too"):
        load_recipe(recipe)


@pytest.mark.parametrize(
    ("text", "size"), [("200GB", 2 * 10**11), ("1.5 tb", 15 * 10**11), ("512", 512), ("3M", 3 * 10**6)]
)
def test_sizes(text: str, size: int) -> None:
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 QB", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(RecipeError, match="not a size"):
        size_in_bytes(text)


def test_the_file_whose_next_use_is_furthest_is_deleted_first(tmp_path: Path) -> None:
    """Uses a b | c | a | b with room for two: c replaces b, whose use is later than that of a."""
    fetched = []

    def fetch(name: str) -> Path:
        fetched.append(name)
        (tmp_path / name).write_text(name)
        return tmp_path / name

    stream = ShardStream([{"a", "b"}, {"c"}, {"a"}, {"b"}], {"a": 1, "b": 1, "c": 1}, Store(fetch, {}, True, 2))
    for step, name in ((0, "a"), (0, "b"), (1, "c"), (2, "a"), (3, "b")):
        stream.reach(step)
        assert stream.path(name).read_text() == name
    stream.close(wait=True)
    assert fetched == ["a", "b", "c", "b"]
