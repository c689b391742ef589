"""Keep the records of a run with the table that they make: `python tests/benchmarks/keep_records.py runs/NAME eval/results/NAME`.

Given the same place twice, the table is made again from the records kept there. A test makes every kept table again and
compares the bytes.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TABLE = ("matrix.md", "matrix.svg")
_RECIPE, _COPY = "recipe.yaml", ".recipe.yaml"  # as kept, as in a run's directory


def keep(run: Path, place: Path) -> None:
    """Copy the records of `run` to `place`, and make their table."""
    (place / "records").mkdir(parents=True, exist_ok=True)
    if run.resolve() != place.resolve():
        for stale in (place / "records").glob("*.json"):
            stale.unlink()
        for record in (run / "records").glob("*.json"):
            shutil.copy(record, place / "records")
        for name, kept in ((_COPY, _RECIPE), ("claims.yaml", "claims.yaml")):
            if (run / name).is_file():
                shutil.copyfile(run / name, place / kept)
    with tempfile.TemporaryDirectory() as directory:
        report(place, Path(directory))
        for name in TABLE:
            shutil.copyfile(Path(directory) / name, place / name)


def report(place: Path, directory: Path) -> None:
    """Make the report of kept records in another directory."""
    shutil.copytree(place / "records", directory / "records")
    for kept, name in ((_RECIPE, _COPY), ("claims.yaml", "claims.yaml")):
        if (place / kept).is_file():
            shutil.copyfile(place / kept, directory / name)
    subprocess.run([sys.executable, "-m", "quantlab", "report", str(directory), "--json"], check=True, stdout=subprocess.DEVNULL)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a run, or kept records whose table is to be made again")
    parser.add_argument("place", type=Path, help="where they are kept")
    options = parser.parse_args()
    if not (options.run / "records").is_dir():
        parser.error(f"{options.run} holds no records; run a recipe that evaluates first")
    keep(options.run, options.place)


if __name__ == "__main__":
    main()
