"""Heat maps by layer and bars by batch size: a damaged layer is named, no layer of an even model is, no number is lost."""

from dataclasses import replace
from pathlib import Path

import pytest

from quantlab.evaluation.record import MatrixErrors, Record
from quantlab.report.files import read_records
from quantlab.report.leaderboard.leaderboard import build_leaderboard
from quantlab.report.matrix.html import to_html
from quantlab.report.matrix.layer_maps import LEVELS, _levels, group_maps, layer_maps, matrix_maps
from quantlab.report.matrix.matrix import build_matrix
from quantlab.report.matrix.rows import same_changes, same_layout
from quantlab.report.matrix.speed_bars import WIDTH, lay_out_bars
from tests.report.conftest import enrich, make_recipe

ROOT = Path(__file__).parents[2]


def test_a_damaged_layer_is_named_and_its_variant_ranks_last(rich: list[Record]) -> None:
    errors, routers = layer_maps(build_matrix(rich))
    assert errors.sentences == (
        "faulty: the error of layer 3 stands out, 82.0 %, 16.3 times as far off as the median of its layers.",
    )
    assert len(routers.sentences) == 1
    tiles = dict(errors.lines)["faulty"]
    assert [tile.stands_out for tile in tiles] == [index == 3 for index in range(8)]
    assert (
        max(tile.level for _, line in errors.lines for tile in line if tile.level is not None)
        == tiles[3].level
        == LEVELS - 1
    )
    board = build_leaderboard([("run", [(record.variant, record) for record in rich])])
    assert board.places[-1].row.variant == "faulty"
    assert board.places[-1].best == len(board.places)
    assert "stands out" in to_html(build_matrix(rich))


def test_an_even_model_is_not_accused() -> None:
    matrix = build_matrix([enrich(record) for record in make_recipe()])
    assert [found.sentences for found in layer_maps(matrix)] == [(), ()]


def test_no_map_where_nothing_was_measured(recipe: list[Record]) -> None:
    assert layer_maps(build_matrix(recipe)) == matrix_maps(build_matrix(recipe)) == ()
    assert "Where in the model" not in to_html(build_matrix(recipe))


def test_layers_stand_in_the_order_of_their_numbers(rich: list[Record]) -> None:
    def error(layer: int) -> MatrixErrors:
        return MatrixErrors(layer=f"layer {layer}", kind="q_proj", count=1, relative_error=0.1, relative_error_max=0.1)

    rich[4] = rich[4].model_copy(update={"matrix_errors": tuple(error(layer) for layer in (10, 2, 1))})
    (found,) = [one for one in matrix_maps(build_matrix(rich)) if one.name == "matrices-w4a16"]
    assert found.heads == ("1", "2", "10")
    assert [tile.level for tile in found.lines[0][1]] == [0, 0, 0]


def test_bars_have_one_scale_and_room_for_their_text(rich: list[Record]) -> None:
    panels = lay_out_bars(build_matrix(rich))
    assert [panel.key for panel in panels] == ["decode-1", "decode-8", "decode-32", "prefill-1"]
    assert len({panel.one for panel in panels}) == 1
    for panel in panels:
        assert [bar.variant for bar in panel.bars] == [record.variant for record in rich]
        for bar in panel.bars:
            ratio = float(bar.text.partition("×")[0])
            assert bar.length == pytest.approx(ratio * (panel.one - panel.left), abs=1)
            assert max(bar.high, panel.left + bar.length) + 50 <= WIDTH
    noisy = [(panel.key, bar.variant) for panel in panels for bar in panel.bars if bar.noise]
    assert noisy == [("decode-8", "int8")]
    assert "hatch-decode-8)" in to_html(build_matrix(rich))


def test_no_bars_without_speed(recipe: list[Record]) -> None:
    untimed = [record.model_copy(update={"speed": None}) for record in recipe]
    assert lay_out_bars(build_matrix(untimed)) == ()
    assert "Speed by batch size" not in to_html(build_matrix(untimed))


def test_groups_of_a_task_are_shown(rich: list[Record]) -> None:
    (found,) = group_maps(build_matrix(rich))
    assert found.heads == ("512 tokens", "1024 tokens", "2048 tokens")
    assert [name for name, _ in found.lines] == [record.variant for record in rich]
    assert dict(found.lines)["source"][0].text == "88.0"
    assert "retrieval by group" in to_html(build_matrix(rich))


def test_a_variant_without_error_does_not_press_the_others_together() -> None:
    level = _levels([1e-7, 0.01, 0.03, 0.1])
    assert level(1e-7) == level(0.001) == 0
    assert level(0.01) < level(0.03) < level(0.1) == LEVELS - 1
    assert [_levels([0.1, 0.12])(value) for value in (0.1, 0.12)] == [0, 0]


def faults(records: list[Record], *, at: int, times: float) -> tuple[str, ...]:
    """The sentences if the error of one layer of a second int4 variant is `times` that of the first variant."""
    quality = records[4].quality
    assert quality is not None
    assert quality.divergence is not None
    errors = {
        layer: found.model_copy(update={key: 1.1 * times ** (layer == f"layer {at}") * getattr(found, key) for key in ("value", "low", "high")})
        for layer, found in quality.divergence.layer_errors.items()
    }  # fmt: skip
    divergence = quality.divergence.model_copy(update={"layer_errors": errors})
    second = records[4].model_copy(
        update={"variant": "second", "quality": quality.model_copy(update={"divergence": divergence})}
    )
    return layer_maps(build_matrix([*records, second]))[0].sentences


def test_a_layer_is_held_against_the_same_layer_of_similar_rows(rich: list[Record]) -> None:
    sound = rich[:5]
    assert faults(sound, at=5, times=1.0) == faults(sound, at=5, times=1.3) == ()
    (sentence,) = faults(sound, at=5, times=1.8)
    assert sentence.startswith("second: the error of layer 5 stands out")
    assert sentence.endswith("2.0 times that of w4a16 (same layout), 1.1 times in its other layers.")
    memory = sound[4].memory
    assert memory is not None
    other = memory.model_copy(update={"weights_bytes": memory.weights_bytes + 1})
    alone = build_matrix([*sound, rich[-1].model_copy(update={"memory": other})])
    assert "same layout" not in " ".join(layer_maps(alone)[0].sentences)


def test_layers_are_compared_among_variants_of_the_same_passes_only() -> None:
    """A cast's rounding errors are a millionth of those of pruning; comparing them within a layout would name layers wrongly."""
    records = read_records(ROOT / "eval" / "results" / "quickstart" / "records")
    by_name = {row.variant: row for row in build_matrix(records).rows}
    assert same_layout(by_name["fp16"], by_name["pruned-8"])
    assert same_layout(by_name["w4a16"], by_name["pruned-8-w4a16"])
    assert not same_changes(by_name["fp16"], by_name["pruned-8"])
    assert not same_changes(by_name["w4a16"], by_name["pruned-8-w4a16"])
    assert not same_changes(by_name["source"], by_name["source"]), "nothing was changed"
    assert not same_changes(by_name["fp16"], by_name["fp16"]), "the dtype alone was changed"
    rounded = by_name["w4a16"].record.passes[0].model_copy(update={"algorithm": "rtn"})
    other = replace(by_name["w4a16"], record=by_name["w4a16"].record.model_copy(update={"passes": (rounded,)}))
    assert same_changes(by_name["w4a16"], other), "by another algorithm"
    assert [found.sentences for found in layer_maps(build_matrix(records))] == [(), ()]
