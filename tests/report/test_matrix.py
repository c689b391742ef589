"""matrix.json has its documented names, and only records that belong together share a matrix."""

import json

import pytest

from quantlab.errors import ArtifactError
from quantlab.evaluation.measured import Measured
from quantlab.evaluation.record import Record
from quantlab.report.matrix.matrix import build_matrix

TOP = {"schema", "recipe", "recipe_sha256", "baseline", "hardware", "rows"}
MEASURED = {
    "accuracy_loss_percent",
    "speed_over_fp16",
    "perplexity",
    "perplexity_change_percent",
    "kl_to_baseline",
    "top1_agreement",
}
PLAIN = {
    "memory_percent_of_fp16",
    "weights_bytes",
    "quantized_weights_percent_of_fp16",
    "artifact_bytes",
    "peak_memory_bytes",
    "load_seconds",
}
KEYS = {
    "variant", "description", "artifact", "artifact_sha256", "record", "hardware", "accuracy_loss_percent", "memory_percent_of_fp16",
    "speed_over_fp16", "perplexity", "perplexity_change_percent", "kl_to_baseline", "top1_agreement", "bits_per_byte",
    "next_token_accuracy", "divergence", "significance", "tasks", "compute_dtype", "domains", "weights_bytes", "fp16_weights_bytes",
    "quantized_weights_percent_of_fp16", "artifact_bytes", "peak_memory_bytes", "peak_memory_of", "kv_cache_bytes_per_token", "kv_cache",
    "load_seconds", "load_seconds_interval", "decode_tokens_per_second", "prefill_tokens_per_second", "decode_over_fp16",
    "prefill_over_fp16", "time_to_first_token_seconds", "energy_joules_per_token", "quartiles", "noise", "tokens_per_expert",
    "matrix_errors", "twin_memory_percent_of_fp16", "twin", "layout", "failures", "versions",
}  # fmt: skip
BY_BATCH = {"decode_tokens_per_second", "prefill_tokens_per_second"}


def test_json_names_the_promised_fields(recipe: list[Record]) -> None:
    document = json.loads(build_matrix(recipe).to_json())
    assert document.keys() >= TOP
    assert document["schema"] == 1
    assert [row["variant"] for row in document["rows"]] == [record.variant for record in recipe]
    for row in document["rows"]:
        assert row.keys() >= {"variant", "artifact"} | MEASURED | PLAIN | BY_BATCH
        assert row["decode_tokens_per_second"].keys() == {"1", "8"}
        assert row["prefill_tokens_per_second"].keys() == {"1"}
    w4a16 = document["rows"][4]
    for name in MEASURED:
        assert w4a16[name].keys() == {"value", "low", "high", "n"}
    assert all(isinstance(w4a16[name], int | float) for name in PLAIN)
    assert w4a16["decode_tokens_per_second"]["8"].keys() == {"value", "low", "high", "n"}


def test_numbers_come_from_the_records(recipe: list[Record]) -> None:
    row, record = build_matrix(recipe).rows[4], recipe[4]
    assert record.memory is not None
    assert record.speed is not None
    held = json.loads(build_matrix(recipe).to_json())["rows"][4]
    percent = 100 * record.memory.weights_bytes / record.memory.fp16_weights_bytes
    assert row.number("memory_percent_of_fp16") == held["memory_percent_of_fp16"] == percent
    assert row.measured("speed_over_fp16") == record.speed.decode_over_fp16["1"]
    assert held["speed_over_fp16"] == record.speed.decode_over_fp16["1"].model_dump()
    assert held["load_seconds"] == record.memory.load_seconds.value
    assert held["load_seconds_interval"] == record.memory.load_seconds.model_dump()


def test_missing_cells_are_null_under_their_usual_keys(damaged: list[Record]) -> None:
    document = json.loads(build_matrix(damaged).to_json())
    pruned = next(row for row in document["rows"] if row["variant"] == "pruned-8")
    complete = next(row for row in document["rows"] if row["variant"] == "fp16")
    assert pruned.keys() == complete.keys()
    assert all(pruned[name] is None for name in MEASURED | PLAIN)
    assert pruned["decode_tokens_per_second"] == {"1": None, "8": None}
    assert pruned["domains"] == {"code": None, "prose": None}
    assert [failure["cell"] for failure in pruned["failures"]] == ["quality", "speed"]


def test_every_row_has_every_key_of_earlier_versions(rich: list[Record]) -> None:
    """Other programs read matrix.json by these names; later versions may only add."""
    for row in json.loads(build_matrix(rich).to_json())["rows"]:
        assert row.keys() >= KEYS
    assert not {"documents", "document_items"} & KEYS


def test_every_measured_batch_size_becomes_a_key(recipe: list[Record]) -> None:
    speed = recipe[1].speed
    assert speed is not None
    at_32 = Measured(value=300, low=290, high=310, n=9)
    recipe[1] = recipe[1].model_copy(
        update={
            "speed": speed.model_copy(
                update={"decode_tokens_per_second": speed.decode_tokens_per_second | {"32": at_32}}
            )
        }
    )
    first, second, *_ = json.loads(build_matrix(recipe).to_json())["rows"]
    assert list(first["decode_tokens_per_second"]) == ["1", "8", "32"]
    assert first["decode_tokens_per_second"]["32"] is None
    assert second["decode_tokens_per_second"]["32"] == at_32.model_dump()


@pytest.mark.parametrize("infinite", [float("inf"), float("nan")])
def test_numbers_that_are_none_become_failures(recipe: list[Record], infinite: float) -> None:
    quality = recipe[4].quality
    assert quality is not None
    broken = quality.model_copy(update={"perplexity": Measured(value=infinite, low=infinite, high=infinite, n=10)})
    recipe[4] = recipe[4].model_copy(update={"quality": broken})
    row = build_matrix(recipe).rows[4]
    assert row.measured("perplexity") is None
    assert row.measured("accuracy_loss_percent") is None
    assert row.failures[-1].reason == "no finite number: perplexity"
    assert row.measured("speed_over_fp16") is not None


def test_no_records_is_an_error() -> None:
    with pytest.raises(ArtifactError, match="no records to report"):
        build_matrix([])


def test_a_variant_twice_is_an_error(recipe: list[Record]) -> None:
    with pytest.raises(ArtifactError, match="two records of one variant\n  where: source"):
        build_matrix([*recipe, recipe[0]])


@pytest.mark.parametrize(
    "field", ["recipe", "recipe_sha256", "baseline", "baseline_sha256", "suite", "suite_sha256", "hardware"]
)
def test_strangers_are_refused(recipe: list[Record], field: str) -> None:
    recipe[3] = recipe[3].model_copy(update={field: "other"})
    with pytest.raises(
        ArtifactError, match=f"cannot stand in one matrix\n  where: int8_weight, {field}\n  found: `other`"
    ) as caught:
        build_matrix(recipe)
    assert "on one machine" in str(caught.value.fix)
