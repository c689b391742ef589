"""Every metric is declared once and completely. Records of earlier versions are converted when read."""

import json
from pathlib import Path

import numpy as np
import pytest

from quantlab.evaluation.metric import metrics_of
from quantlab.evaluation.old_records import passes_of, with_later_fields
from quantlab.evaluation.quality.metrics import SUMS, Divergence, Documents, Domain
from quantlab.evaluation.record import PARTS, Record, read_record
from quantlab.plan.compile import describe
from quantlab.recipe.load import load_recipe
from quantlab.stages import _as_recorded

ROOT = Path(__file__).parents[2]
MODELS = [*PARTS.values(), Domain, Divergence]
DECLARED = [(model, one) for model in MODELS for one in metrics_of(model).values()]


@pytest.mark.parametrize(
    ("model", "declared"),
    DECLARED,
    ids=lambda one: getattr(one, "name", one.__name__ if isinstance(one, type) else None),
)
def test_a_declaration_is_whole(model: type, declared) -> None:
    metric, own = declared.metric, metrics_of(model)
    assert metric.meaning.endswith(".")
    assert ("{}" in metric.heading) == ("{}" in metric.meaning) == (declared.by_batch or model is Domain)
    assert bool(metric.head) == ("main" in metric.tables), "two short lines for a terminal"
    assert bool(metric.rank) == ("main" in metric.tables and "headline" not in metric.tables)
    assert metric.made_of in ("", *own)
    assert metric.origin.partition(".")[0] in ("", *own)
    assert metric.loss is None or metric.loss.tested in own
    assert metric.count in SUMS
    if metric.statistic is not None:
        assert metric.statistic({name: np.array([1.0, 2.0]) for name in SUMS}).shape == (2,)


def test_names_are_unique_where_tables_are_flat() -> None:
    names = [name for model in PARTS.values() for name in [*model.model_fields, *metrics_of(model)]]
    fields = [name for model in PARTS.values() for name in model.model_fields]
    assert len(fields) == len(set(fields))
    computed = set(names) - set(fields)
    assert {"memory_percent_of_fp16", "speed_over_fp16"} <= computed
    for model in PARTS.values():
        for name in computed & set(metrics_of(model)):
            assert isinstance(getattr(model, name), property), "a number that is not a field is computed from fields"
            assert metrics_of(model)[name].metric.statistic is None, "its value is what the property returns"
    ranks = [one.metric.rank for _, one in DECLARED if one.metric.rank]
    assert len(ranks) == len(set(ranks))
    headings = [one.metric.heading for model, one in DECLARED]
    assert len(headings) == len(set(headings))


def test_every_number_of_a_part_is_declared() -> None:
    """Exceptions: duplicates of other fields, and fields without a number for tables."""
    others = {"kl_mean", "top1_agreement", "predictions_bytes", "layer_error_tokens", "processes"}
    for model in MODELS:
        for name, field in model.model_fields.items():
            if name not in metrics_of(model) and name not in others:
                assert field.annotation not in (int, float), (model, name)
                assert "Measured" not in str(field.annotation) or name in ("router_agreement", "layer_errors"), name


def test_the_sums_are_fields_of_documents() -> None:
    assert set(SUMS) == Documents.model_fields.keys() - {"tokens_sha256", "domain"}


def test_the_kept_records_are_made_again_by_their_declarations() -> None:
    """The sums over documents in records written by earlier code reproduce every number of these records."""
    compared = 0
    for path in (ROOT / "eval" / "results").glob("*/records/*.json"):
        quality = read_record(path).quality
        assert quality is not None
        assert quality.documents is not None
        sums = {name: values.sum() for name, values in quality.documents.sums().items()}
        for part in (quality, quality.divergence) if quality.divergence else (quality,):
            for name, declared in metrics_of(type(part)).items():
                held, statistic = getattr(part, name), declared.metric.statistic
                if held is None or statistic is None or "bits_per_byte" in name:  # earlier versions did not store bytes
                    continue
                assert statistic(sums) == pytest.approx(held.value, rel=1e-9, abs=1e-12), (path, name)
                compared += 1
    assert compared >= 150


def test_passes_of_old_records_are_those_that_new_records_hold() -> None:
    read = 0
    for path in sorted((ROOT / "recipes").rglob("*.yaml")):
        for variant in load_recipe(path).recipe.variants.values():
            recorded = [_as_recorded(step).model_dump() for step in variant.passes]
            assert passes_of(describe(variant.passes)) == recorded, path
            read += 1
    assert read >= 20


def test_old_records_get_their_facts_once() -> None:
    path = ROOT / "eval" / "results" / "quickstart" / "records" / "pruned-8-w4a16.json"
    old = json.loads(path.read_bytes())
    assert "passes" not in old
    assert "timed once with" in old["speed"]["layout"]
    record = read_record(path)
    assert [one.change for one in record.passes] == [("prune", "0.08"), ("quantize", "int4_g128")]
    assert record.speed is not None
    assert record.speed.timed_with == ("w4a16",)
    assert "timed" not in record.speed.layout
    assert record.quality is not None
    assert record.quality.documents is not None
    assert record.quality.documents.kl_tokens == record.quality.documents.tokens
    again = json.loads(record.model_dump_json())
    assert with_later_fields(again) == again, "a new record is left alone"
    assert Record.model_validate(again) == record
    sampled = old | {"quality": json.loads(json.dumps(old["quality"]))}
    sampled["quality"]["divergence"]["kl_sample"] = "one in 3 of 13,260 tokens"
    documents = Record.model_validate(with_later_fields(sampled)).quality.documents
    assert documents.kl_tokens == (), "how many of a document's tokens it was taken on is not known"
    assert with_later_fields([]) == []
