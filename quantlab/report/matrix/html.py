"""matrix.html and matrix.svg: the matrix as one self-contained page, and its plot as a separate file for README files."""

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from quantlab.evaluation.speed.metrics import timed_words
from quantlab.report.claims.table import claims_table
from quantlab.report.matrix.attention_table import attention_table
from quantlab.report.matrix.columns import Column, columns
from quantlab.report.matrix.csv_file import to_csv
from quantlab.report.matrix.engine_table import engine_table
from quantlab.report.matrix.expert_map import SHARE_MARKS, SHARE_NAMES, heat_maps
from quantlab.report.matrix.html_tables import HtmlTable, make_html_table
from quantlab.report.matrix.layer_maps import LETTER_WIDTH, TILE_HEIGHT, TILE_WIDTH, group_maps, layer_maps, matrix_maps
from quantlab.report.matrix.matrix import Matrix
from quantlab.report.matrix.recommend import RULES, Recommendation, at_least, recommend
from quantlab.report.matrix.rows import noise_of
from quantlab.report.matrix.scatter_plot import SPEED_NAMES, Plot, lay_out
from quantlab.report.matrix.speed_bars import lay_out_bars
from quantlab.report.matrix.table_cells import cell, failures, notes, number, served_warnings, tokens_of


def to_html(matrix: Matrix) -> str:
    """The text of matrix.html."""
    every, found = columns(matrix), recommend(matrix)
    return (
        environment()
        .get_template("matrix.html.j2")
        .render(
            matrix=matrix,
            cards=tuple((each, _facts(matrix, each, every)) for each in found),
            rules=RULES,
            sheets=_sheets(matrix, every, found),
            every=every,
            csv=to_csv(matrix),
            plots=plots(matrix),
            speed_names=SPEED_NAMES,
            panels=lay_out_bars(matrix),
            timed=timed_words(row.speed.timed for row in matrix.rows if row.speed),
            noisy=any(row.noise for row in matrix.rows),
            layer_maps=layer_maps(matrix),
            group_maps=group_maps(matrix),
            matrix_maps=matrix_maps(matrix),
            attention=attention_table(matrix),
            engines=engine_table(matrix),
            claims=claims_table(matrix),
            tile_size=(TILE_WIDTH, TILE_HEIGHT, LETTER_WIDTH),
            notes=(*served_warnings(matrix), *notes(matrix)),
            failures=failures(matrix),
            tokens=tokens_of(matrix),
            versions=versions(matrix),
            heat_maps=heat_maps(matrix),
            share_names=SHARE_NAMES,
            share_marks=SHARE_MARKS,
        )
    )


def main_and_rest(every: tuple[Column, ...]) -> tuple[tuple[Column, ...], tuple[Column, ...]]:
    """The columns of the first table, and all others."""
    main = tuple(column for column in every if column.is_in("main"))
    return main, tuple(column for column in every if column not in main)


def to_svg(matrix: Matrix) -> str | None:
    """The text of matrix.svg; None if there is nothing to draw."""
    plot = lay_out(matrix, width=760, height=420)
    if plot is None:
        return None
    template = environment().get_template("pareto.svg.j2")
    return template.render(matrix=matrix, plot=plot, name="wide", standalone=True, speed_names=SPEED_NAMES) + "\n"


def plots(matrix: Matrix) -> tuple[tuple[str, Plot], ...]:
    """The plot for wide and for narrow windows; empty if there is nothing to draw."""
    sizes = (("wide", lay_out(matrix, width=900, height=440)), ("narrow", lay_out(matrix, width=358, height=380)))
    return tuple((name, plot) for name, plot in sizes if plot)


@cache
def environment() -> Environment:
    """The environment of the templates, with those compiled so far; an undefined variable is an error."""
    return Environment(
        loader=PackageLoader("quantlab.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )


def versions(matrix: Matrix) -> tuple[tuple[str, str], ...]:
    """Each package with its version, or with all versions if rows differ."""
    found = [row.record.versions for row in matrix.rows]
    names = sorted({name for one in found for name in one})
    return tuple((name, " / ".join(sorted({one[name] for one in found if name in one}))) for name in names)


def _sheets(matrix: Matrix, every: tuple[Column, ...], found: tuple[Recommendation, ...]) -> tuple[HtmlTable, ...]:
    picked = {row.variant: tuple(one.goal for one in found if one.variant == row.variant) for row in matrix.rows}
    main, others = main_and_rest(every)
    tasks = tuple(column for column in others if column.group == "tasks")
    domains = tuple(column for column in others if column.group == "domains")
    rest = tuple(column for column in others if column.group not in ("tasks", "domains"))
    caption = "Accuracy, memory and speed of every variant"
    sheets = [make_html_table(matrix, "main", caption, main, picked=picked)]
    if tasks:
        sheets.append(make_html_table(matrix, "tasks", "Tasks: what each variant lost, and its score", tasks))
    sheets.append(make_html_table(matrix, "rest", "All other numbers", rest))
    if domains:
        sheets.append(make_html_table(matrix, "domains", "Quality by kind of text", domains))
    return tuple(sheets)


def _facts(matrix: Matrix, found: Recommendation, every: tuple[Column, ...]) -> tuple[str, ...]:
    """The three numbers of a recommended row in a few words."""
    row = next((row for row in matrix.rows if row.variant == found.variant), None)
    if row is None:
        return ()
    loss = cell(matrix, row, every[0])
    facts = []
    if loss.state == "value":
        facts.append("no measurable accuracy loss" if loss.verdict != "loss" else f"{loss.text} % accuracy loss")
    memory, speed = row.number("memory_percent_of_fp16"), row.measured("speed_over_fp16")
    if memory is not None:
        facts.append(f"{number(memory, 'percent')} % memory")
    if speed is not None:
        noisy = noise_of(row, "speed_over_fp16") is not None
        facts.append(
            f"at least {at_least(speed)}× speed (noisy)" if noisy else f"{number(speed.value, 'ratio')}× speed"
        )
    return tuple(facts)
