"""The heat map of calibration tokens shows every expert of every layer in the class of its share."""

from quantlab.evaluation.record import Record
from quantlab.report.matrix.expert_map import SHARE_NAMES, heat_maps
from quantlab.report.matrix.html import to_html
from quantlab.report.matrix.matrix import build_matrix

TOKENS = {"layer 1": (100, 100, 100, 100), "layer 2": (10, 45, 145, 200), "layer 3": (0, 0, 0, 400)}


def test_every_expert_is_drawn(recipe: list[Record]) -> None:
    watched = [recipe[0], recipe[1].model_copy(update={"tokens_per_expert": TOKENS}), *recipe[2:]]
    matrix = build_matrix(watched)
    (found,) = heat_maps(matrix)
    assert found.variant == recipe[1].variant
    assert [square.share for square in found.squares] == [2, 2, 2, 2, 0, 1, 2, 3, 0, 0, 0, 4]
    assert len(SHARE_NAMES) == 5
    assert [name for name, *_ in found.layers] == ["1", "2", "3"]
    assert found.squares[4].text == "layer 2, expert 0: 10 tokens, 0.10× its share"
    assert found.sentence == "Fewest: 0 tokens for expert 0 of layer 3."
    page = to_html(matrix)
    assert page.count('width="11" height="11"') == 12
    assert "layer 2, expert 3: 200 tokens, 2.00× its share" in page


def test_no_map_where_no_expert_was_watched(recipe: list[Record]) -> None:
    assert heat_maps(build_matrix(recipe)) == ()
    assert "Calibration tokens" not in to_html(build_matrix(recipe))
