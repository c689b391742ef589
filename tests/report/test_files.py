"""The files of a report: written atomically, deterministic, and without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from quantlab.errors import ArtifactError
from quantlab.evaluation.record import Record
from quantlab.report import files
from quantlab.report.files import read_records, write_report

NAMES = {"matrix.json", "matrix.md", "matrix.csv", "matrix.html", "matrix.svg"}


def test_writes_all_files_and_leaves_nothing_else(recipe: list[Record], tmp_path: Path) -> None:
    matrix = write_report(recipe, tmp_path / "new" / "report")
    written = tmp_path / "new" / "report"
    assert {path.name for path in written.iterdir()} == NAMES
    assert (written / "matrix.json").read_text() == matrix.to_json()


def test_output_is_the_same_to_the_byte(damaged: list[Record], tmp_path: Path) -> None:
    write_report(damaged, tmp_path / "one")
    write_report(damaged, tmp_path / "two")
    for name in NAMES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_output_does_not_depend_on_the_process(recipe: list[Record], tmp_path: Path) -> None:
    """Another hash seed changes the order of sets."""
    records = tmp_path / "records"
    records.mkdir()
    for record in recipe:
        (records / f"{record.variant}.json").write_text(record.model_dump_json())
    code = "import sys; from pathlib import Path; from quantlab.report.files import *; write_report(read_records(Path(sys.argv[1])), Path(sys.argv[2]))"
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", code, str(records), str(tmp_path / seed)],
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(files.__file__).parents[2])},
        )
    for name in NAMES:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_a_plot_of_earlier_records_does_not_stay(recipe: list[Record], tmp_path: Path) -> None:
    write_report(recipe, tmp_path)
    write_report([record.model_copy(update={"quality": None}) for record in recipe], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == NAMES - {"matrix.svg"}
    assert "matrix.svg" not in (tmp_path / "matrix.md").read_text(encoding="utf-8")


def test_a_failed_write_keeps_the_old_file(
    recipe: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(recipe, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in NAMES}

    def fails(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(
        ArtifactError, match=r"a report cannot be written\n  where: .*\n  found: No space left on device"
    ):
        write_report(recipe[:3], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_records_are_read_with_the_source_first(recipe: list[Record], tmp_path: Path) -> None:
    for record in recipe:
        (tmp_path / f"{record.variant}.json").write_text(record.model_dump_json())
    names = [record.variant for record in read_records(tmp_path)]
    assert names[0] == "source"
    assert names[1:] == sorted(names[1:])
    assert len(names) == len(recipe)


def test_no_records_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no \*\.json"):
        read_records(tmp_path)


def test_imports_without_torch() -> None:
    root = Path(files.__file__).parent
    paths = (path.relative_to(root).with_suffix("") for path in root.rglob("[!_]*.py"))
    modules = sorted(f"quantlab.report.{'.'.join(path.parts)}" for path in paths)
    assert len(modules) >= 20
    code = f"import sys, {', '.join(modules)}; print(*sorted(set(sys.modules) & {{'torch', 'transformers'}}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(files.__file__).parents[2])},
    )
    assert done.stdout.strip() == ""
