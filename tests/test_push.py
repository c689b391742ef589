"""`quantlab push` on a hub on the loopback: what is sent, what is refused, and the card as the hub's own classes read it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner, Result

from quantlab.checkpoint.hub import open_hub_model
from quantlab.checkpoint.index import open_checkpoint
from quantlab.cli import app
from quantlab.errors import ArtifactError, CheckpointError, QuantlabError
from quantlab.evaluation.engines.judged import find_source
from quantlab.evaluation.engines.verdict import EngineVerdict
from quantlab.evaluation.record import Record
from quantlab.plan.compile import compile_plan
from quantlab.push import card_for_hub
from quantlab.recipe.load import load_recipe
from quantlab.report.matrix.card_results import usage, with_results
from quantlab.run.directory import RunDirectory
from quantlab.run.execute import make_artifacts
from tests.checkpoints import make_checkpoint
from tests.fake_model_hub import COMMIT, Fault, Hub, Repo, running, use
from tests.report.conftest import rich  # noqa: F401 - a fixture

SOURCE_CARD = "---\nlicense: other\nlicense_name: deepseek\nlicense_link: LICENSE-MODEL\n---\n\n# A model\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact in several shards, of a model of the hub."""
    root = tmp_path_factory.mktemp("push")
    source = make_checkpoint(root / "source", "llama")
    (source / "README.md").write_text(SOURCE_CARD)
    (source / "LICENSE-MODEL").write_text("as you like\n")
    (root / "recipe.yaml").write_text("model: org/source\nvariants:\n  w4a16: [{quantize: int4_g128}]\n")
    monkeypatch = pytest.MonkeyPatch()
    with running(root / "uploads") as hub:
        use(hub, root, monkeypatch)
        hub.repos["org/source"] = Repo(source)
        loaded = load_recipe(root / "recipe.yaml")
        plan = compile_plan(loaded.recipe, open_hub_model("org/source", revision=None))
        make_artifacts(plan, loaded, RunDirectory(root / "run"), lambda _: lambda _: None)
    monkeypatch.undo()
    return root / "run" / "artifacts" / "w4a16"


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "w4a16")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(tmp_path / "uploads") as hub:
        use(hub, tmp_path, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        yield hub


def _push(artifact: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["push", str(artifact), "me/w4a16", *options])


def _refused(result: Result) -> QuantlabError:
    assert isinstance(result.exception, QuantlabError), result.output
    return result.exception


def test_an_artifact_arrives_whole_private_and_with_a_card(hub: Hub, artifact: Path) -> None:
    before = (artifact / "README.md").read_bytes()
    result = _push(artifact)
    assert result.exit_code == 0, result.exception
    repo = hub.repos["me/w4a16"]
    assert repo.private
    sent = {path.relative_to(repo.directory).as_posix(): path for path in repo.directory.rglob("*") if path.is_file()}
    assert set(sent) == {path.relative_to(artifact).as_posix() for path in artifact.rglob("*") if path.is_file()}
    assert all(
        path.read_bytes() == (artifact / name).read_bytes() for name, path in sent.items() if name != "README.md"
    )
    assert len(hub.asked("/commit/")) == 1, "everything appears at once"
    assert (artifact / "README.md").read_bytes() == before, "the card on disk is not changed"
    data = ModelCard(sent["README.md"].read_text()).data
    assert data.base_model == "org/source"
    assert data.get("base_model_relation") == "quantized"
    assert (data.license, data.license_name, data.license_link) == ("other", "deepseek", "LICENSE-MODEL")
    assert data.library_name == "transformers"
    assert {"quantlab", "compressed-tensors"} <= set(data.tags or ())
    assert "vllm serve me/w4a16" in sent["README.md"].read_text()
    hub.repos["me/w4a16"].private = False
    assert open_hub_model("me/w4a16", revision=None).fingerprint() == open_checkpoint(artifact).fingerprint()


def test_a_public_repository_and_json_are_asked_for(hub: Hub, artifact: Path) -> None:
    result = _push(artifact, "--public", "--json", "--base-model", "org/other")
    assert result.exit_code == 0, result.exception
    assert not hub.repos["me/w4a16"].private
    assert json.loads(result.stdout)["repository"] == "me/w4a16"
    assert ModelCard((hub.repos["me/w4a16"].directory / "README.md").read_text()).data.base_model == "org/other"


@pytest.mark.parametrize("spoiled", ["changed", "missing", "extra", "no artifact"])
def test_what_is_not_complete_is_refused_before_anything_is_sent(hub: Hub, artifact: Path, spoiled: str) -> None:
    shard = next(artifact.glob("*.safetensors"))
    if spoiled == "changed":
        content = shard.read_bytes()
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif spoiled == "missing":
        shard.unlink()
    elif spoiled == "extra":
        (artifact / "notes.txt").write_text("mine")
    else:
        (artifact / "manifest.json").unlink()
    assert isinstance(_refused(_push(artifact)), ArtifactError)
    assert not hub.requests


@pytest.mark.parametrize("token", ["none", "wrong", "of a reader"])
def test_a_token_that_may_not_write_is_told(
    hub: Hub, artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token: str
) -> None:
    if token == "none":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    elif token == "wrong":
        monkeypatch.setenv("HF_TOKEN", "hf_other")
    else:
        (tmp_path / "theirs").mkdir()
        hub.repos["me/w4a16"] = Repo(tmp_path / "theirs", read_only=True)
    error = _refused(_push(artifact))
    assert isinstance(error, ArtifactError)
    assert "does not let you write" in error.what
    assert "token that may write" in (error.fix or "")
    assert not hub.asked("/lfs/|/commit/")


def test_an_interrupted_push_goes_on(hub: Hub, artifact: Path) -> None:
    shards = sorted(artifact.glob("*.safetensors"))
    assert len(shards) > 2

    def count() -> int:
        return len([path for path in hub.blobs.iterdir() if path.is_file()])

    original = Hub.fault

    def after_two(self: Hub, path: str) -> Fault | None:
        return Fault(path, 1, 500) if path.startswith("/lfs/") and count() >= 2 else original(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hub, "fault", after_two)
        assert isinstance(_refused(_push(artifact)), CheckpointError)
    assert count() == 2
    assert not hub.asked("/commit/")
    assert not list(hub.repos["me/w4a16"].directory.iterdir()), "nothing of it is visible"
    hub.requests.clear()
    assert _push(artifact).exit_code == 0
    assert len(hub.asked("^/lfs/", "PUT")) == len(shards) - 2


@pytest.mark.parametrize("repo", ["name", "a/b/c", "../x", ""])
def test_what_is_no_id_is_refused(artifact: Path, repo: str) -> None:
    result = CliRunner().invoke(app, ["push", str(artifact), repo])
    assert isinstance(_refused(result), ArtifactError)


def _head(artifact: Path) -> str:
    return (artifact / "README.md").read_text().partition("<!-- measured")[0]


def test_measured_results_are_a_model_index_that_the_hub_reads(artifact: Path, rich: list[Record]) -> None:  # noqa: F811
    record = next(record for record in rich if record.variant == "w4a16")
    head = with_results(_head(artifact), record)
    data = ModelCard(head).data
    assert data.model_name == "w4a16"
    found = {(one.dataset_type, one.metric_type): one.metric_value for one in data.eval_results or ()}
    assert record.quality is not None
    assert found[f"quantlab-{record.suite_name}", "perplexity"] == pytest.approx(
        record.quality.perplexity.value, abs=1e-6
    )
    for task in record.tasks:
        assert found[task.name, task.metric] == pytest.approx(task.score.value, abs=1e-6)
    assert with_results(head, record) == head, "a second report changes nothing"
    assert head.partition("\n---\n")[2] == _head(artifact).partition("\n---\n")[2], "the text is not touched"


def test_engines_that_agree_have_a_block_of_use(rich: list[Record]) -> None:  # noqa: F811
    verdicts = (
        EngineVerdict(engine="transformers", format="compressed-tensors", verdict="agrees"),
        EngineVerdict(engine="vllm", format="compressed-tensors", verdict="differs"),
        EngineVerdict(engine="llama.cpp", format="gguf", verdict="agrees", export_sha256="1"),
    )
    text = "\n".join(usage(rich[0].model_copy(update={"engines": verdicts})))
    assert 'from_pretrained("DIR", dtype="auto")' in text
    assert "vllm serve" not in text
    assert usage(rich[0].model_copy(update={"engines": ()})) == []
    assert 'from_pretrained("me/x", dtype="auto")' in card_for_hub(text, "me/x", base_model=None)


def test_the_source_of_an_artifact_is_found_in_the_cache_of_the_hub(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = made.parents[2] / "hf"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    found = find_source(made)
    assert found is not None
    assert found.is_relative_to(cache)
    assert found.name == COMMIT
