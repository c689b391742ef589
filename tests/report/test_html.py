"""matrix.html is self-contained and complete; matrix.svg is well-formed; labels of the plot do not overlap."""

import itertools
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from quantlab.evaluation.measured import Measured
from quantlab.evaluation.record import Failure, Record
from quantlab.report.claims.check import load_claims
from quantlab.report.matrix.html import to_html, to_svg
from quantlab.report.matrix.matrix import build_matrix
from quantlab.report.matrix.scatter_plot import lay_out, nice_ticks

GUIDE = Path(__file__).parents[2] / "eval" / "claims" / "guide.yaml"
VOID = {"meta", "link", "br", "wbr", "img", "hr", "input"}


class Page(HTMLParser):
    """Collects the elements that the tests check, and detects incorrectly nested tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.rows: dict[str, list[str]] = {}
        self.headings: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.attributes.append((tag, found))
        self.loads += [
            value for name in ("src", "href", "action", "data", "xlink:href") if (value := found.get(name)) is not None
        ]
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


def test_the_page_loads_nothing(recipe: list[Record]) -> None:
    text = to_html(build_matrix(recipe))
    loads = Page(text).loads
    assert {load[:5] for load in loads} == {"data:", "#matr"}
    bare = text.replace('xmlns="http://www.w3.org/2000/svg"', "").replace("url(#hatch", "")
    for load in ("http:", "https:", "url(", "@import", "//cdn", "fetch(", "import("):
        assert load not in bare


def test_the_page_has_every_row_and_number(recipe: list[Record]) -> None:
    matrix = build_matrix(recipe)
    page = Page(to_html(matrix))
    rows = [found["data-variant"] for tag, found in page.attributes if tag == "tr" and "data-variant" in found]
    assert rows == 3 * [record.variant for record in recipe]  # the matrix, all other numbers, kinds of text
    for needed in (
        "0.92",
        "0.61 to 1.23",
        "34.9",
        "2.61",
        "pruned-8-w4a16",
        "random-weight twin",
        "AMD EPYC 9354P",
        "65,536",
        "torch 2.13.0",
        recipe[0].recipe_sha256,
    ):
        assert needed in page.text
    sorts = {found["data-sort"] for tag, found in page.attributes if tag == "td" and "data-sort" in found}
    loss = matrix.rows[4].measured("accuracy_loss_percent")
    assert loss is not None
    assert str(loss.value) in sorts


def test_the_page_can_be_used_without_eyes_or_mouse(recipe: list[Record]) -> None:
    page = Page(to_html(build_matrix(recipe)))
    assert len(page.ids) == len(set(page.ids))
    for tag, found in page.attributes:
        if tag == "th":
            assert found.get("scope") in ("col", "row")
        if tag == "svg" and "aria-labelledby" in found:
            assert set(str(found["aria-labelledby"]).split()) <= set(page.ids)
        if tag == "svg":
            assert found.get("aria-labelledby") or found.get("aria-label")
        if found.get("class") == "mark":
            assert found["tabindex"] == "0"
            assert str(found["data-variant"]) in str(found["aria-label"])
    assert {found.get("aria-sort") for tag, found in page.attributes if "data-better" in found} == {"none"}
    assert [tag for tag, _ in page.attributes if tag == "h1"] == ["h1"]
    assert ("html", {"lang": "en"}) in page.attributes


def test_failures_stand_in_the_cell_with_their_reason(damaged: list[Record]) -> None:
    text = to_html(build_matrix(damaged))
    page = Page(text)
    assert "<layer 3>" not in text
    assert "no kernel for int8 | activations of 4 dimensions: `o_proj` <layer 3>" in page.text
    assert [found["class"] for _, found in page.attributes if found.get("class") == "reason"] == 8 * ["reason"]
    assert "Not drawn: int8: accuracy loss not measured." in page.text


def test_nothing_measured_is_still_a_page(recipe: list[Record]) -> None:
    matrix = build_matrix(
        [record.model_copy(update={"quality": None, "memory": None, "speed": None}) for record in recipe]
    )
    page = Page(to_html(matrix))
    assert "svg" not in [tag for tag, _ in page.attributes]
    assert "no recommendation" in page.text
    assert to_svg(matrix) is None


def test_svg_is_well_formed_and_named(recipe: list[Record]) -> None:
    text = to_svg(build_matrix(recipe))
    assert text is not None
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    labels = [found.text for found in root.iter("{http://www.w3.org/2000/svg}text") if found.get("class") == "label"]
    assert labels == [record.variant for record in recipe]
    assert root.findtext("{http://www.w3.org/2000/svg}title") == "Accuracy loss against memory, quickstart"


@pytest.mark.parametrize(("width", "height"), [(900, 440), (760, 420), (358, 380)])
def test_labels_keep_apart_and_inside(recipe: list[Record], width: float, height: float) -> None:
    plot = lay_out(build_matrix(recipe), width=width, height=height)
    assert plot is not None
    for one, other in itertools.combinations(plot.labels, 2):
        assert one.box.overlap(other.box) == 0, (one.text, other.text)
    for label in plot.labels:
        assert label.box.left >= 0
        assert label.box.right <= width
        assert 0 <= label.box.top < label.box.bottom <= height


def test_marks_of_equal_memory_are_told_apart_but_stay_close(recipe: list[Record]) -> None:
    plot = lay_out(build_matrix(recipe), width=900, height=440)
    assert plot is not None
    assert all(abs(mark.x - mark.true_x) <= 14 for mark in plot.marks)
    assert len({(mark.x, mark.y) for mark in plot.marks}) == len(plot.marks)
    assert {mark.variant for mark in plot.marks if mark.on_frontier} == {
        "w4a16",
        "w4a16-experts",
        "int8",
        "int8_weight",
        "source",
    }


def test_a_collapsed_variant_does_not_flatten_the_others(
    recipe: list[Record], constructed: Callable[..., Record]
) -> None:
    plot = lay_out(
        build_matrix([*recipe, constructed("collapsed", loss=(93, 1), rise=(9000, 50))]), width=900, height=440
    )
    assert plot is not None
    assert "collapsed" not in [mark.variant for mark in plot.marks]
    assert plot.left_out == ("collapsed: off the scale, accuracy loss 93.00 % at 50.0 % of memory",)


def test_a_variant_without_any_loss_can_be_drawn(recipe: list[Record]) -> None:
    quality = recipe[1].quality
    assert quality is not None
    same = recipe[1].model_copy(
        update={"quality": quality.model_copy(update={"accuracy_loss_percent": Measured(value=0, low=0, high=0, n=5)})}
    )
    assert lay_out(build_matrix([recipe[0], same]), width=358, height=380) is not None


def test_ticks_are_round() -> None:
    assert nice_ticks(0, 100, at_most=6) == [0, 20, 40, 60, 80, 100]
    assert nice_ticks(-0.09, 1.67, at_most=6) == [0, 0.5, 1, 1.5]
    assert nice_ticks(0, 0.0003, at_most=5) == [0, 0.0001, 0.0002, 0.0003]


def test_a_memory_failure_shows_in_the_memory_cell(recipe: list[Record]) -> None:
    failure = Failure(cell="memory", reason="the process was killed")
    recipe[4] = recipe[4].model_copy(update={"memory": None, "failures": (failure,)})
    page = Page(to_html(build_matrix(recipe)))
    assert "the process was killed" in page.text
    assert "Not drawn: w4a16: memory not measured." in page.text


def test_the_first_table_shows_every_batch_size(rich: list[Record]) -> None:
    page = Page(to_html(build_matrix(rich)))
    keys = [found["data-key"] for tag, found in page.attributes if tag == "th" and "data-key" in found]
    assert [key for key in keys if str(key).startswith("decode_tokens")] == [
        f"decode_tokens_per_second.{batch}" for batch in (1, 8, 32)
    ]
    assert (
        keys.index("decode_tokens_per_second.32") < keys.index("prefill_tokens_per_second.1") < keys.index("perplexity")
    )


def test_every_number_of_maps_bars_and_claims_leads_to_its_place_in_a_record(rich: list[Record]) -> None:
    claims, _ = load_claims(GUIDE)
    links = {record.variant: f"records/{record.variant}.json" for record in rich}
    text = to_html(build_matrix(rich, links=links, claims=claims))
    found = [unquote(link) for link in re.findall('<a [^>]*href="(records/[^"]*#[^"]*)"', text)]
    for field, count in (
        ("w4a16.json#quality.divergence.layer_errors.layer 3", 1),
        ("w4a16.json#quality.divergence.router_agreement.layer 3", 1),
        ("w4a16.json#matrix_errors.layer 3.mlp.experts.gate_proj", 1),
        ("w4a16.json#tokens_per_expert.layer 3", 1),
        ("w4a16.json#tasks.retrieval.by_group.512 tokens", 1),
        ("w4a16.json#tasks.retrieval.loss", 1),
        ("w4a16.json#speed.decode_over_fp16.32", 2),  # a table and a bar
    ):
        assert found.count(f"records/{field}") == count, field
    claimed = re.findall('<td><a class="value" href="([^"]*)">', text)
    assert "records/w4a16.json#quality.accuracy_loss_percent" in claimed
    assert "records/w4a16.json#speed.twin_memory_percent_of_fp16" not in claimed, "it was not measured"


def test_only_what_was_disturbed_is_called_noisy(rich: list[Record]) -> None:
    speed = rich[4].speed
    assert speed is not None
    for key, expected in (("decode_tokens_per_second.8", 0), ("decode_tokens_per_second.1", 2)):
        noisy = speed.model_copy(update={"noise": {key: "others took a core"}})
        records = [*rich[:3], rich[4].model_copy(update={"speed": noisy})]
        assert to_html(build_matrix(records)).count("at least 2.5× speed (noisy)</li>") == expected, "memory and speed"
