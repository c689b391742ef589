"""The matrix of one recipe: its records side by side, one row per variant, as matrix.json holds it.

`matrix.json` is an interface other tools read: later versions may add fields, never rename these. Every key stands in
every row, so a reader can index without asking first; what was not measured is null.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic_core import to_json

from quantlab.errors import ArtifactError
from quantlab.evaluation.record import Attention, Record
from quantlab.report.claims.check import CheckedClaims, Claims, check_claims
from quantlab.report.matrix.rows import Row, build_row, finite_attention, row_as_json


@dataclass(frozen=True)
class Matrix:
    """The records of one recipe, relative to its baseline.

    Attributes:
        recipe, recipe_sha256, suite, suite_sha256, hardware: as all its records name them.
        baseline: the variant that losses are measured against.
        rows: one per variant.
        attention: long contexts by implementation of attention, on the baseline's twin; None where the suite asks for none.
        claims: claims of others, checked against the rows; None where the recipe names none.
    """

    recipe: str
    recipe_sha256: str
    baseline: str
    hardware: str
    suite: str
    suite_sha256: str
    rows: tuple[Row, ...]
    attention: Attention | None = None
    claims: CheckedClaims | None = None

    def to_json(self) -> str:
        """The text of matrix.json."""
        about = {
            "schema": 1,
            "recipe": self.recipe,
            "recipe_sha256": self.recipe_sha256,
            "baseline": self.baseline,
            "hardware": self.hardware,
            "suite": self.suite,
            "suite_sha256": self.suite_sha256,
            "rows": [row_as_json(row, self.rows) for row in self.rows],
            "attention": self.attention,
            "claims": self.claims,
        }
        return to_json(about, indent=2).decode() + "\n"


def build_matrix(
    records: Sequence[Record], *, links: Mapping[str, str] | None = None, claims: Claims | None = None
) -> Matrix:
    """Put the records of one recipe side by side.

    Args:
        records: one per variant, in the order the rows shall have.
        links: where the record of a variant lies, relative to the directory of the report.
        claims: to be checked.

    Raises:
        RecipeError: a claim is about a variant that has no record.
        ArtifactError: there is no record, a variant appears twice, or the records do not belong together.
    """
    if not records:
        raise ArtifactError("there are no records to report", fix="run `quantlab eval` first")
    _refuse_strangers(records)
    first = records[0]
    attention = finite_attention(next((record.attention for record in records if record.attention), None))
    rows = tuple(build_row(record, link=(links or {}).get(record.variant)) for record in records)
    return Matrix(
        recipe=first.recipe,
        recipe_sha256=first.recipe_sha256,
        baseline=first.baseline,
        hardware=first.hardware,
        suite=first.suite,
        suite_sha256=first.suite_sha256,
        rows=rows,
        attention=attention,
        claims=check_claims(claims, rows, baseline=first.baseline, attention=attention) if claims else None,
    )


def _refuse_strangers(records: Sequence[Record]) -> None:
    """Rows are compared with each other, so they must come from one recipe, suite, baseline and machine."""
    first = records[0]
    seen: set[str] = set()
    for record in records:
        if record.variant in seen:
            raise ArtifactError(
                "two records of one variant",
                where=record.variant,
                found="the variant again",
                fix="keep one record per variant",
            )
        seen.add(record.variant)
        for label, ours, theirs in (
            ("recipe", first.recipe, record.recipe),
            ("recipe_sha256", first.recipe_sha256, record.recipe_sha256),
            ("baseline", first.baseline, record.baseline),
            ("baseline_sha256", first.baseline_sha256, record.baseline_sha256),
            ("suite", first.suite, record.suite),
            ("suite_sha256", first.suite_sha256, record.suite_sha256),
            ("hardware", first.hardware, record.hardware),
        ):
            if ours != theirs:
                raise ArtifactError(
                    "records that cannot stand in one matrix",
                    where=f"{record.variant}, {label}",
                    found=f"`{theirs}`, but `{ours}` in {first.variant}",
                    fix="run `quantlab eval` again for all variants with one recipe, on one machine",
                )
