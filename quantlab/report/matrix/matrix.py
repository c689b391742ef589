"""The matrix of one recipe: its records side by side, one row per variant, as matrix.json holds it.

`matrix.json` is an interface for other tools: later versions may add fields but never rename them. Every row has every key, so
readers need not check for keys; values that were not measured are null.
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
        recipe, recipe_sha256, suite, suite_sha256, hardware: equal in all its records.
        baseline: the variant that losses are measured against.
        rows: one per variant.
        attention: long contexts by implementation of attention, on the baseline's twin; None if the suite has no attention section.
        claims: published claims, checked against the rows; None if the recipe names none.
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
    """Build the matrix from the records of one recipe.

    Args:
        records: one per variant, in row order.
        links: path of each variant's record, relative to the report's directory.
        claims: the claims to check.

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
