"""The run of this folder's recipe as a table for people and a file for programs.

python tests/benchmarks/ladder/table.py runs/ladder eval/results/ladder-deepseek-v3-mini
"""

import argparse
import json
from pathlib import Path

REFERENCE = "int4-rtn-absmax"
MEASURED = ("kl_to_baseline", "perplexity", "perplexity_change_percent", "accuracy_loss_percent", "top1_agreement")
SECTIONS = {
    "int4 in groups of 128": "int4",
    "int8": "int8",
    "Pruned": "pruned",
    "Fewer experts": "fewer",
}

Row = dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path, help="what `quantlab run` made")
    parser.add_argument("out", type=Path, help="the tables, without suffix")
    arguments = parser.parse_args()
    matrix = json.loads((arguments.run / "matrix.json").read_text())
    rows = {row["variant"]: row for row in matrix["rows"]}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".md").write_text("\n".join(markdown(matrix, rows)) + "\n")
    kept = {
        "about": {key: matrix[key] for key in ("recipe", "recipe_sha256", "suite", "suite_sha256", "hardware")}
        | {"versions": matrix["rows"][0]["versions"]},
        "rows": [
            {key: row[key] for key in ("variant", "description", "artifact_sha256", "weights_bytes", *MEASURED)}
            for row in rows.values()
        ],
    }
    arguments.out.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")


def markdown(matrix: Row, rows: dict[str, Row]) -> list[str]:
    """The lines of the page; every variant stands in the section its name begins with."""
    source = rows["source"]["perplexity"]
    lines = [
        "# The reference DeepSeek-V3 rounded, pruned, and both",
        "",
        f"{source['n']:,} held-out tokens (suite {matrix['suite']}), activations in float32, calibration with 128 x 512 tokens. The source "
        f"has a perplexity of {source['value']:.2f} ({source['low']:.2f} to {source['high']:.2f}). In brackets 95 % intervals, "
        "paired with the source over the same drawn documents. KL is the mean over tokens, in nats; relative, to int4 rounded "
        f"with scale absmax/7 (`{REFERENCE}`). int4 by `gptq`, `awq` and `rtn` with activations is judged on the same tokens beside the "
        "peers, in [peers-deepseek-v3-mini.md](peers-deepseek-v3-mini.md).",
    ]
    for heading, prefix in SECTIONS.items():
        lines += [
            "",
            f"## {heading}",
            "",
            "| variant | KL to source | relative | perplexity change % | accuracy loss % |",
        ]
        lines += ["|---|--:|--:|--:|--:|"]
        lines += [line(row, rows) for name, row in rows.items() if name.startswith(prefix)]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(matrix["rows"][0]["versions"].items()))
    return [
        *lines,
        "",
        f"Recipe sha256 `{matrix['recipe_sha256']}`. Hardware: {matrix['hardware']}. Versions: {versions}.",
    ]


def line(row: Row, rows: dict[str, Row]) -> str:
    """One variant; a dash where it was not measured."""
    kl, reference = row["kl_to_baseline"], rows[REFERENCE]["kl_to_baseline"]
    ratio = f"{kl['value'] / reference['value']:.3f}" if kl and reference else "–"
    cells = [
        interval(kl, 4),
        ratio,
        interval(row["perplexity_change_percent"], 2),
        interval(row["accuracy_loss_percent"], 2),
    ]
    return f"| `{row['variant']}` | {' | '.join(cells)} |"


def interval(measured: Row | None, digits: int) -> str:
    """A number and its interval."""
    if measured is None:
        return "–"
    return f"{measured['value']:.{digits}f} ({measured['low']:.{digits}f} to {measured['high']:.{digits}f})"


if __name__ == "__main__":
    main()
