"""A run calibrated on datasets by name: what it writes, and that it continues without the hub."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantlab.checkpoint.index import open_checkpoint
from quantlab.cli import app
from quantlab.errors import QuantlabError
from quantlab.plan.compile import compile_plan
from quantlab.recipe.load import load_recipe
from quantlab.texts.locate import Commits, with_located_text
from tests.checkpoints import make_checkpoint
from tests.evaluation.conftest import write_corpus, write_tokenizer
from tests.fake_hub import FakeHub
from tests.texts.conftest import hub, parquet  # noqa: F401 - a fixture

RECIPE = """
model: model
calibration:
  samples: 4
  length: 16
  mix:
    - {dataset: me/corpus, share: 0.75}
    - {dataset: calibration.jsonl, share: 0.25}
variants:
  a: [{quantize: int4_g32, algorithm: {name: gptq}}]
"""


@pytest.fixture
def files(hub: FakeHub, tmp_path: Path) -> Path:  # noqa: F811
    write_tokenizer(make_checkpoint(tmp_path / "model", "llama"))
    write_corpus(tmp_path / "calibration.jsonl")
    texts = [json.loads(line)["text"] for line in (tmp_path / "calibration.jsonl").read_text().splitlines()]
    hub.datasets["me/corpus"] = {"train.parquet": parquet([{"text": text} for text in texts])}
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def run(files: Path, *options: str, verb: str = "run") -> str:
    out = ("--out", str(files / "out"), "--device", "cpu") if verb in {"run", "eval"} else ()
    result = CliRunner().invoke(app, [verb, str(files / "recipe.yaml"), *out, *options], catch_exceptions=False)
    return result.output


@pytest.mark.slow
def test_a_run_on_datasets(files: Path, hub: FakeHub) -> None:  # noqa: F811
    assert "a" in run(files, verb="plan")
    run(files)
    artifact = files / "out" / "artifacts" / "a"
    manifest = json.loads((artifact / "manifest.json").read_text())
    calibration = manifest["calibration"]
    first, second = calibration["sources"]
    assert (first["dataset"], first["commit"], first["split"]) == ("me/corpus", hub.commit("me/corpus"), "train")
    assert (first["samples"], first["tokens"], second["samples"]) == (3, 48, 1)
    assert calibration["documents_sha256"]
    assert "corpus" not in calibration
    assert "datasets" in manifest["identity"]["versions"]
    card = (artifact / "README.md").read_text()
    assert f"| me/corpus train | {hub.commit('me/corpus')[:12]} |" in card

    weights = {path.name: path.read_bytes() for path in artifact.glob("*.safetensors")}
    shutil.rmtree(artifact)
    hub.requests.clear()
    hub.datasets["me/corpus"]["more.txt"] = b"another commit"
    hub.fail("me/corpus", status=500)
    run(files)  # from what the run kept
    assert not [one for one in hub.requests if "me/corpus" in one]
    assert {path.name: path.read_bytes() for path in artifact.glob("*.safetensors")} == weights
    assert json.loads((artifact / "manifest.json").read_text()) == manifest


def test_nothing_is_left_if_the_hub_refuses(files: Path, hub: FakeHub) -> None:  # noqa: F811
    hub.fail("me/corpus", status=403, path="/revision/")
    with pytest.raises(QuantlabError, match="the hub refuses access"):
        run(files)
    assert not (files / "out").exists()


def test_the_key_is_what_decides_the_samples(files: Path) -> None:
    (files / "copy.jsonl").write_bytes((files / "calibration.jsonl").read_bytes())
    (files / "other.jsonl").write_text((files / "calibration.jsonl").read_text().replace("a", "b", 1))
    (files / "t.jinja").write_text("{{ messages }}")

    def key(section: str) -> str:
        head, _, rest = RECIPE.partition("calibration:")
        section += "" if "length" in section else ", length: 16"
        path = files / "recipe.yaml"
        path.write_text(f"{head}calibration: {{{section}}}\n{rest[rest.index('variants') :]}")
        source = open_checkpoint(files / "model")
        recipe = with_located_text(load_recipe(path), source.directory, Commits(files / "none"))
        plan = compile_plan(recipe.recipe, source, corpus_sha256=recipe.corpus_sha256())
        return plan.variants[0].recipe_key

    first = key("dataset: calibration.jsonl")
    same = ["dataset: copy.jsonl", "dataset: calibration.jsonl, split: train", "dataset: copy.jsonl, memory: 1 GB"]
    assert {key(section) for section in same} == {first}
    others = ["dataset: other.jsonl"] + [
        f"dataset: calibration.jsonl, {field}"
        for field in ("column: text", "special_tokens: text", "chat_template: t.jinja", "seed: 1", "samples: 5", "length: 17")
    ]  # fmt: skip
    keys = [key(section) for section in [*others, "corpus: calibration.jsonl"]]
    assert len({first, *keys}) == len(keys) + 1


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ("{samples: 4}", "no text is named"),
        ("{corpus: a.jsonl, dataset: b}", "the text is named by `corpus` and `dataset`"),
        ("{corpus: a.jsonl, split: test}", "`split` belongs to a text named by `dataset`"),
        ("{mix: [{dataset: a, share: 1}], column: x}", "`column` belongs to each entry of `mix`"),
        ("{mix: [{dataset: a, share: 0.5}, {dataset: b, share: 0.6}]}", "the shares of the mixture add up to 1.1"),
        ("{mix: [{dataset: a}]}", "`share` is missing"),
        ("{dataset: a, special_tokens: plain}", "unknown word"),
        ("{dataset: a, splits: test}", "unknown key"),
    ],
)
def test_a_section_that_names_no_text(files: Path, section: str, what: str) -> None:
    head, _, rest = RECIPE.partition("calibration:")
    (files / "recipe.yaml").write_text(f"{head}calibration: {section}\n{rest[rest.index('variants') :]}")
    with pytest.raises(QuantlabError) as raised:
        run(files, verb="plan")
    assert raised.value.what.startswith(what)
    assert raised.value.fix


MEASURED = """
model: model
calibration: {corpus: calibration.jsonl, samples: 4, length: 16}
variants:
  a: [{quantize: int4_g32, algorithm: {name: gptq}}]
evaluate: {suite: suite.yaml}
"""
SUITE = """
name: tiny
version: 1
text: {dataset: me/corpus, documents: 12, length: 24, tokens_per_domain: 600}
served: {sequences: 2, prefix: 4, steps: 3, greedy_tokens: 4}
"""


@pytest.mark.slow
def test_a_run_measured_on_a_dataset(files: Path, hub: FakeHub) -> None:  # noqa: F811
    (files / "recipe.yaml").write_text(MEASURED)
    (files / "suite.yaml").write_text(SUITE)
    assert "`run` compares them when they are drawn" in run(files, verb="plan")
    output = run(files)
    assert "of 12 held-out documents share 13 words in a row" in output  # it is the same text
    overlap = json.loads((files / "out" / "overlap.json").read_text())
    assert overlap["shared_documents"] == overlap["documents"] - sum(len(one.split()) < 13 for one in kept(files))
    record = json.loads((files / "out" / "records" / "a.json").read_text())
    assert record["quality"]["perplexity"]["value"] > 1
    hub.fail("me/corpus", status=500)
    run(files, verb="eval")  # from what the run kept


def kept(files: Path) -> list[str]:
    (path,) = (files / "out" / "texts").glob("held-out-*.jsonl")
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]
