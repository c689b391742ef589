"""matrix.md and matrix.csv parse back to the numbers they were made from."""

import csv
import io
import re

import pytest
from markdown_it import MarkdownIt

from quantlab.evaluation.measured import Measured
from quantlab.evaluation.memory.metrics import Expanded
from quantlab.evaluation.record import Record
from quantlab.report.matrix.csv_file import to_csv
from quantlab.report.matrix.html import to_html
from quantlab.report.matrix.markdown import to_markdown
from quantlab.report.matrix.matrix import build_matrix
from quantlab.report.matrix.table_cells import PRUNED_NOTE, human_bytes, notes, number


def tables(markdown: str) -> list[list[list[str]]]:
    """Every table as rows of cell texts, parsed like on GitHub."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif (
            token.type == "inline"
            and token.level >= 3
            and found
            and token.children is not None
            and token.map is not None
            and found[-1]
            and token.level > 3
        ):
            found[-1][-1].append("".join(child.content for child in token.children))
    return found


def plain(text: str) -> float:
    return float(text.split(" ")[0].replace("−", "-").replace(",", ""))


def test_markdown_tables_hold_the_numbers(recipe: list[Record]) -> None:
    matrix = build_matrix(recipe)
    first, *details = tables(to_markdown(matrix, with_plot=True))
    assert first[0] == [
        "variant",
        "accuracy loss %",
        "memory % of FP16",
        "speed × FP16 (random-weight twin)",
        "verdict",
        "passes",
    ]
    assert all(len(line) == len(table[0]) for table in (first, *details) for line in table)
    assert first[-1] == ["n", "65,536", "–", "9", "", ""]
    assert [line[0] for line in first[1:-1]] == ["source (baseline)", *(row.variant for row in matrix.rows[1:])]
    assert first[1][1] == "baseline"
    for line, row in zip(first[2:-1], matrix.rows[1:], strict=True):
        loss, speed = row.measured("accuracy_loss_percent"), row.measured("speed_over_fp16")
        assert loss is not None
        assert speed is not None
        assert plain(line[1]) == pytest.approx(loss.value, abs=0.005)
        assert plain(line[2]) == pytest.approx(row.number("memory_percent_of_fp16"), abs=0.05)
        assert plain(line[3]) == pytest.approx(speed.value, abs=0.005)
        low, high = re.findall(r"[−\d.]+", line[1].split("(")[1])
        assert plain(low) == pytest.approx(loss.low, abs=0.005)
        assert plain(high) == pytest.approx(loss.high, abs=0.005)


def test_markdown_tells_failures_and_escapes_them(damaged: list[Record]) -> None:
    first, *_ = tables(to_markdown(build_matrix(damaged), with_plot=False))
    by_name = {line[0]: line for line in first[1:-1]}
    assert by_name["int8"][1] == "failed: no kernel for int8 | activations of 4 dimensions: `o_proj` <layer 3>"
    assert by_name["pruned-8"][1:4] == ["failed: killed: out of memory", "–", "failed: timed out after 600 s"]
    assert by_name["w4a16"][3] == "–"


def test_markdown_says_where_the_numbers_come_from(recipe: list[Record]) -> None:
    text = to_markdown(build_matrix(recipe), with_plot=True)
    for needed in (
        recipe[0].recipe_sha256,
        recipe[0].suite_sha256,
        "65,536",
        "torch 2.13.0",
        "AMD EPYC",
        "95 %",
        PRUNED_NOTE,
        "](matrix.svg)",
    ):
        assert needed in text
    assert "matrix.svg" not in to_markdown(build_matrix(recipe), with_plot=False)


def test_rows_whose_steps_were_not_fused_are_named(recipe: list[Record]) -> None:
    assert not any("forward functions" in note for note in notes(build_matrix(recipe)))
    records = list(recipe)
    for place in (2, 4):
        speed = records[place].speed
        assert speed is not None
        slow = speed.model_copy(update={"not_fused": "there is a part nobody knows"})
        records[place] = records[place].model_copy(update={"speed": slow})
    (note,) = (note for note in notes(build_matrix(records)) if "forward functions" in note)
    assert "int8, w4a16 ran" in note
    assert note.endswith("there is a part nobody knows.")


def test_substitutes_for_an_operator_of_the_processor_are_named(recipe: list[Record]) -> None:
    assert not any("processor that measured" in note for note in notes(build_matrix(recipe)))
    quality = recipe[2].quality
    assert quality is not None
    operators = ("native kernels", "int8 products in float32 (torch's int8 operator saturates on this processor)")
    records = list(recipe)
    records[2] = recipe[2].model_copy(update={"quality": quality.model_copy(update={"operators": operators})})
    (note,) = (note for note in notes(build_matrix(records)) if "processor that measured" in note)
    assert note.startswith("The processor that measured quality computed int8 products in float32")


def test_the_note_on_pruning_needs_a_pruned_row(recipe: list[Record]) -> None:
    assert PRUNED_NOTE not in to_markdown(build_matrix(recipe[:6]), with_plot=True)


def test_matrices_without_a_kernel_are_reported(recipe: list[Record]) -> None:
    plain = to_markdown(build_matrix(recipe), with_plot=True)
    assert "are expanded" not in plain
    memory = recipe[2].memory
    assert memory is not None
    fallbacks = (
        Expanded(format="int4_g128_asym", count=1042, reasons=("the CUDA kernels: no zero points",), held="packed"),
        Expanded(format="fp8_block", count=3, reasons=("no kernel", "activations are not rounded"), held="dense"),
    )
    recipe[2] = recipe[2].model_copy(update={"memory": memory.model_copy(update={"expanded": fallbacks})})
    assert Record.model_validate_json(recipe[2].model_dump_json()) == recipe[2]
    text = to_markdown(build_matrix(recipe), with_plot=True).replace("\\", "")
    name = recipe[2].variant
    assert (
        f"{name}: 1,042 int4_g128_asym matrices are expanded for every product: the CUDA kernels: no zero points."
        in text
    )
    assert (
        f"{name}: 3 fp8_block matrices are expanded to 16 bits when they are loaded: no kernel; activations are not rounded."
        in text
    )


def test_different_versions_are_told(recipe: list[Record]) -> None:
    recipe[2] = recipe[2].model_copy(update={"versions": {"torch": "2.12.0"}})
    assert "different versions" in to_markdown(build_matrix(recipe), with_plot=True)


def test_csv_holds_the_numbers_in_full(damaged: list[Record]) -> None:
    matrix = build_matrix(damaged)
    lines = list(csv.DictReader(io.StringIO(to_csv(matrix))))
    assert [line["variant"] for line in lines] == [row.variant for row in matrix.rows]
    for line, row in zip(lines, matrix.rows, strict=True):
        memory = row.number("memory_percent_of_fp16")
        assert line["memory_percent_of_fp16"] == ("" if memory is None else repr(memory))
        for name in ("accuracy_loss_percent", "speed_over_fp16", "perplexity", "kl_to_baseline", "top1_agreement"):
            measured = row.measured(name)
            parts = (line[name], line[f"{name}_low"], line[f"{name}_high"], line[f"{name}_n"])
            assert parts == (
                ("",) * 4
                if measured is None
                else tuple(map(repr, (measured.value, measured.low, measured.high, measured.n)))
            )
        at_8 = row.measured("decode_tokens_per_second.8")
        assert line["decode_tokens_per_second_8"] == ("" if at_8 is None else repr(at_8.value))
    assert "quality: no kernel for int8" in next(line for line in lines if line["variant"] == "int8")["failures"]


def test_kinds_of_text_stand_with_change_kl_interval_and_n_in_every_format(recipe: list[Record]) -> None:
    change, kl = Measured(value=1.5, low=1.25, high=1.75, n=4000), Measured(value=0.02, low=0.018, high=0.022, n=4000)
    quality = recipe[4].quality
    assert quality is not None
    prose = quality.domains["prose"].model_copy(update={"perplexity_change_percent": change, "kl_to_baseline": kl})
    recipe[4] = recipe[4].model_copy(
        update={"quality": quality.model_copy(update={"domains": quality.domains | {"prose": prose}})}
    )
    matrix = build_matrix(recipe)
    line = list(csv.DictReader(io.StringIO(to_csv(matrix))))[4]
    for name, found in (("perplexity_change_percent_on_prose", change), ("kl_to_baseline_on_prose", kl)):
        parts = [line[name], line[f"{name}_low"], line[f"{name}_high"], line[f"{name}_n"]]
        assert list(map(float, parts)) == [found.value, found.low, found.high, found.n]
    (table,) = [found for found in tables(to_markdown(matrix, with_plot=True)) if "prose: change %" in found[0]]
    shown = dict(zip(table[0], table[5], strict=True))
    assert (shown["prose: change %"], shown["prose: KL, nats"]) == ("1.50 (1.25 to 1.75)", "0.0200 (0.0180 to 0.0220)")
    assert dict(zip(table[0], table[-1], strict=True))["prose: change %"] == "4,000"
    page = to_html(matrix)
    assert "w4a16, prose: change %: 1.50 (1.25 to 1.75) · n = 4,000" in page
    assert "w4a16, prose: KL, nats: 0.0200 (0.0180 to 0.0220) · n = 4,000" in page


def test_single_measurements_have_no_interval(recipe: list[Record]) -> None:
    memory = recipe[4].memory
    assert memory is not None
    once = memory.model_copy(update={"load_seconds": Measured(value=1.3, low=1.3, high=1.3, n=1)})
    text = to_markdown(build_matrix([recipe[0], recipe[4].model_copy(update={"memory": once})]), with_plot=True)
    (table,) = [found for found in tables(text) if "load, s" in found[0]]
    assert dict(zip(table[0], table[2], strict=True))["load, s"] == "1.30"
    assert dict(zip(table[0], table[-1], strict=True))["load, s"] == "1 to 5"


def test_csv_holds_every_number_of_the_records(rich: list[Record]) -> None:
    """Including interval ends and n: no number that a page can show is missing."""
    lines = list(csv.DictReader(io.StringIO(to_csv(build_matrix(rich)))))
    for record, line in zip(rich, lines, strict=True):
        fours = {tuple(line.get(f"{name}{end}", "") for end in ("", "_low", "_high", "_n")) for name in line}
        repeated = {"accuracy_loss": True, "divergence": {"kl_mean", "top1_agreement"}}  # of other fields
        shown = record.model_dump(exclude={"quality": repeated})
        for found in measured_in(shown):
            assert tuple(map(repr, (found["value"], found["low"], found["high"], found["n"]))) in fours


def measured_in(found: object) -> list[dict[str, float]]:
    if isinstance(found, dict):
        if found.keys() == {"value", "low", "high", "n"}:
            return [found]
        return [one for value in found.values() for one in measured_in(value)]
    return [one for value in found for one in measured_in(value)] if isinstance(found, list | tuple) else []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_999_000, "10.0 MB"),
        (18_900_000, "18.9 MB"),
        (999_600_000, "1.00 GB"),
        (1.3e12, "1.30 TB"),
        (9e15, "9000 TB"),
    ],
)
def test_bytes_in_powers_of_1000(value: float, text: str) -> None:
    assert human_bytes(value) == text


def test_numbers_have_a_real_minus_and_no_minus_zero() -> None:
    assert number(-0.123, "change") == "−0.12"
    assert number(-0.001, "change") == "0.00"
    assert number(0.00003, "nats") == "3.0e-5"
    assert number(1234.5, "rate") == "1,234"
    assert number(0.99815, "share") == "99.81"
