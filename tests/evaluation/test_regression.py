"""A planted regression is detected and located, and equal artifacts are called equal. On the reference checkpoint."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantlab.checkpoint.index import open_checkpoint
from quantlab.evaluation.evaluate import evaluate
from quantlab.evaluation.metric import metrics_of
from quantlab.evaluation.record import Pass, Record
from quantlab.evaluation.request import EvaluatedArtifact, EvaluationRequest
from quantlab.report.comparison.compare import compare
from quantlab.report.leaderboard.leaderboard import build_leaderboard
from quantlab.report.matrix.layer_maps import layer_maps
from quantlab.report.matrix.matrix import build_matrix
from tests.evaluation.test_verify import make

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "eval/reference/deepseek-v3-mini"
LAYER, EXPERT = 4, 17
SUITE = f"""
name: regression
version: 1
text: {{corpus: {ROOT}/eval/corpora/heldout.jsonl, length: 128, tokens_per_domain: 640}}
tasks:
  - {{task: {ROOT}/eval/tasks/grammar.yaml, items: 40}}
layer_error_tokens: 512
"""


def shuffle_scales(artifact: Path) -> None:
    """Permute the scales among the rows of one expert."""
    names = [f"model.layers.{LAYER}.mlp.experts.{EXPERT}.{kind}_proj.weight_scale" for kind in ("gate", "up", "down")]
    generator = torch.Generator().manual_seed(0)
    for name in names:
        file = open_checkpoint(artifact).tensors[name].file
        path = artifact / Path(file).name
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(path)
        order = torch.randperm(tensors[name].numel(), generator=generator)
        tensors[name] = tensors[name].flatten()[order].view_as(tensors[name]).contiguous()
        save_file(tensors, path, metadata=metadata)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    root = tmp_path_factory.mktemp("regression")
    sound = make(REFERENCE, "  w4a16: [{quantize: int4_g128, targets: [routed_experts]}]\n", root).artifact("w4a16")
    (sound / "manifest.json").unlink()
    same, shuffled = (shutil.copytree(sound, root / name) for name in ("same", "shuffled"))
    shuffle_scales(shuffled)
    (root / "suite.yaml").write_text(SUITE)
    directories = {"source": REFERENCE, "sound": sound, "same": same, "shuffled": shuffled}
    made = (Pass(operation="quantize", setting="int4_g128", algorithm="rtn"),)
    artifacts = tuple(
        EvaluatedArtifact(name, name, path, name, name, () if name == "source" else made)
        for name, path in directories.items()
    )
    request = EvaluationRequest(
        directory=root / "run",
        recipe="r",
        recipe_sha256="r",
        suite=root / "suite.yaml",
        baseline="source",
        artifacts=artifacts,
    )
    return {record.variant: record for record in evaluate(request)}


@pytest.mark.slow
def test_a_shuffled_expert_ranks_last_and_its_layer_stands_out(records: dict[str, Record]) -> None:
    found = {name: record.quality for name, record in records.items() if record.quality is not None}
    kl = {name: quality.kl_to_baseline.value for name, quality in found.items() if quality.kl_to_baseline is not None}
    assert sorted(kl, key=kl.__getitem__)[-1] == "shuffled"
    assert kl["shuffled"] > 1.02 * kl["sound"]
    sound, shuffled = (found[name].divergence for name in ("sound", "shuffled"))
    assert sound is not None
    assert shuffled is not None
    assert sound.layer_errors["layer 0"].value == 0, "it has no experts"
    worse = {
        name: shuffled.layer_errors[name].value / error.value
        for name, error in sound.layer_errors.items()
        if name != "layer 0"
    }
    assert worse.pop(f"layer {LAYER}") > 1.5
    assert shuffled.layer_errors[f"layer {LAYER}"].low > sound.layer_errors[f"layer {LAYER}"].high
    assert list(worse.values()) == pytest.approx([1.0] * len(worse), abs=1e-6)
    # routers before the layer are unchanged
    for layer in range(1, LAYER + 1):
        assert shuffled.router_agreement[f"layer {layer}"] == sound.router_agreement[f"layer {layer}"]
    assert shuffled.router_agreement["layer 7"].value < sound.router_agreement["layer 7"].value


def test_the_same_artifact_under_two_names_has_the_same_numbers(records: dict[str, Record]) -> None:
    sound, same = records["sound"], records["same"]
    assert sound.quality is not None
    assert sound.quality == same.quality
    assert sound.tasks == same.tasks


def test_every_loss_has_its_p_and_one_corrected_for_the_rows(records: dict[str, Record]) -> None:
    assert all(not record.failures for record in records.values())
    assert records["source"].quality is not None
    assert records["source"].quality.significance == {}
    for name in ("sound", "same", "shuffled"):
        quality = records[name].quality
        assert quality is not None
        change = quality.significance["perplexity_change_percent"]
        assert change.holm_p is not None
        assert change.p <= change.holm_p <= 3 * change.p
        (grammar,) = records[name].tasks
        assert (grammar.name, grammar.n) == ("grammar", 40)
        assert grammar.score.low > 0.5, "the reference is far above chance"
        assert grammar.significance is not None
        assert grammar.significance.holm_p is not None


def test_tables_rank_the_shuffled_expert_last_and_name_its_layer(records: dict[str, Record]) -> None:
    errors, _ = layer_maps(build_matrix(list(records.values())))
    (sentence,) = errors.sentences
    assert sentence.startswith(f"shuffled: the error of layer {LAYER} stands out")
    marked = [(name, layer) for name, line in errors.lines for layer, tile in enumerate(line) if tile.stands_out]
    assert marked == [("shuffled", LAYER)]
    board = build_leaderboard([("run", [(f"{name}.json", record) for name, record in records.items()])])
    assert (board.places[-1].row.variant, board.places[-1].rank) == ("shuffled", "3"), "surely behind the others"


def test_the_sums_by_document_make_the_numbers_of_the_record(records: dict[str, Record]) -> None:
    for record in records.values():
        assert record.quality is not None
        assert record.quality.documents is not None
        sums = {name: values.sum() for name, values in record.quality.documents.sums().items()}
        for part in (record.quality, record.quality.divergence):
            for name, declared in metrics_of(type(part)).items() if part is not None else ():
                found, statistic = getattr(part, name), declared.metric.statistic
                if found is not None and statistic is not None:
                    assert statistic(sums) == pytest.approx(found.value, rel=1e-9), name
                    assert found.n == sums[declared.metric.count]
        grammar = record.tasks[-1]
        assert sum(grammar.document_items) == grammar.n
        assert sum(grammar.document_scores) / grammar.n == pytest.approx(grammar.score.value)


def test_tables_show_no_difference_between_the_same_artifact_under_two_names(records: dict[str, Record]) -> None:
    untimed = {"memory": None}  # load times vary
    sides = [[(Path(name), records[name].model_copy(update=untimed))] for name in ("sound", "same")]
    (pair,) = compare(*sides, names=("sound", "same")).pairs
    few = [number for number in pair.numbers if number.verdict == "not judged"]  # five documents of each kind of text
    assert all("_on." in number.key and "5 documents" in number.reason for number in few)
    judged = {number.verdict for number in pair.numbers if number not in few}
    assert judged <= {"equal", "no measurable difference"}
    assert {number.key for number in pair.numbers if number.paired} >= {
        "perplexity",
        "kl_to_baseline",
        "task_score.grammar",
    }
    assert {number.difference.value for number in pair.numbers if number.difference is not None} == {0.0}
    board = build_leaderboard([("run", [(f"{name}.json", record) for name, record in records.items()])])
    ranks = {place.row.variant: place.rank for place in board.places}
    assert ranks["sound"] == ranks["same"]
