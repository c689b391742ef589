"""Reads records and writes the files of a report."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from quantlab.errors import ArtifactError
from quantlab.evaluation.record import Record, read_record
from quantlab.report.claims.check import load_claims
from quantlab.report.comparison.compare import GRAMMAR
from quantlab.report.matrix.csv_file import to_csv
from quantlab.report.matrix.html import to_html, to_svg
from quantlab.report.matrix.markdown import to_markdown
from quantlab.report.matrix.matrix import Matrix, build_matrix
from quantlab.report.matrix.model_cards import filled_cards

CLAIMS_NAME = "claims.yaml"


def read_records(directory: Path) -> list[Record]:
    """The records of a directory: the baseline first, the others by name.

    Raises:
        ArtifactError: there is none, or a file is not a record.
    """
    return [record for _, record in _read(directory)]


def find_records(path: Path) -> list[tuple[Path, Record]]:
    """The records at a path, each with its file.

    Args:
        path: a run's directory, a directory of records, an artifact of a run, or a record.

    Raises:
        ArtifactError: the path does not exist or has no records, or a file is not a record.
    """
    if path.is_file():
        return [(path, read_record(path))]
    if path.parent.name == "artifacts" and not (path / "records").is_dir():
        record = path.parent.parent / "records" / f"{path.name}.json"
        return [(record, read_record(record))]
    if not path.is_dir():
        raise ArtifactError("there is no such file or directory", where=str(path), fix=f"give {GRAMMAR}")
    return _read(path / "records" if (path / "records").is_dir() else path)


def _read(directory: Path) -> list[tuple[Path, Record]]:
    records = [(path, read_record(path)) for path in sorted(directory.glob("*.json"))]
    if not records:
        raise ArtifactError(
            "there are no records to report", where=str(directory), found="no *.json", fix="run `quantlab eval` first"
        )
    return sorted(
        records,
        key=lambda found: (found[1].variant != "source", found[1].variant != found[1].baseline, found[1].variant),
    )


def write_report(records: Sequence[Record], directory: Path, *, claims: Path | None = None) -> Matrix:
    """Write matrix.json, .md, .csv, .html and .svg, and fill in the model cards of the run's artifacts.

    Each file is written atomically.

    Args:
        records: one per variant, in row order.
        directory: output directory; created if it does not exist.
        claims: a file of claims to check; it is copied to the report's directory as claims.yaml.

    Raises:
        RecipeError: the claims cannot be read, or concern a variant without a record.
        ArtifactError: the records do not belong together, an artifact was changed since its record, or the directory cannot
            be written.
    """
    _refuse_changed_artifacts(records, directory)
    found, content = (None, None) if claims is None else load_claims(claims)
    matrix = build_matrix(records, links=_links(records, directory), claims=found)
    plot = to_svg(matrix)
    texts = {
        CLAIMS_NAME: content,
        "matrix.svg": plot,
        "matrix.csv": to_csv(matrix),
        "matrix.md": to_markdown(matrix, with_plot=plot is not None),
        "matrix.html": to_html(matrix),
        "matrix.json": matrix.to_json(),  # last, because other tools wait for it
    }
    write_texts(directory, texts)
    for card, text in filled_cards(matrix, directory):
        write_texts(card.parent, {card.name: text})
    return matrix


def _refuse_changed_artifacts(records: Sequence[Record], directory: Path) -> None:
    """Refuse records whose artifact has been replaced: their numbers do not belong to the present artifact."""
    for record in records:
        manifest = directory / record.artifact / "manifest.json"
        if record.artifact != f"artifacts/{record.variant}" or not manifest.is_file():
            continue
        digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
        if digest != record.artifact_sha256:
            raise ArtifactError(
                "an artifact was changed since it was measured",
                where=str(manifest),
                found=f"sha256 {digest[:12]}, but {record.artifact_sha256[:12]} in its record",
                fix="run `quantlab eval` again",
            )


def write_texts(directory: Path, texts: Mapping[str, str | None]) -> None:
    """Write files by atomic rename; a text that is None removes its file.

    Raises:
        ArtifactError: the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            if text is None:
                (directory / name).unlink(missing_ok=True)  # left by an earlier report
            else:
                _replace(directory / name, text)
    except OSError as error:
        raise ArtifactError(
            "a report cannot be written",
            where=str(directory),
            found=error.strerror,
            fix="choose a writable directory",
        ) from error


def _links(records: Sequence[Record], directory: Path) -> dict[str, str]:
    """Links from a run's report to its records, by variant."""
    links = {record.variant: f"records/{record.variant}.json" for record in records}
    return {variant: link for variant, link in links.items() if (directory / link).is_file()}


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(text.encode())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
