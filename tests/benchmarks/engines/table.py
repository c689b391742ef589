"""The verdicts of engines on the artifacts of this folder's recipe, as a table for people and a file for programs.

quantlab run tests/benchmarks/engines/recipe.yaml --out runs/engines
quantlab verify runs/engines/artifacts/w4a16 --engine transformers --engine vllm     # and so on, for every artifact and export
python tests/benchmarks/engines/table.py runs/engines eval/results/engines-reference
"""

import argparse
import json
from pathlib import Path

from quantlab.evaluation.engines.verdict import EngineVerdict, read_verdicts

PAGE = """# What other engines compute of the reference model's artifacts

Made by `quantlab run tests/benchmarks/engines/recipe.yaml --out runs/engines`, then the judge of `quantlab verify DIR --engine ENGINE` for every
artifact and export (some without that verb's checks of the files), each engine in the environment that `quantlab engines install ENGINE` makes, then `python
tests/benchmarks/engines/table.py runs/engines eval/results/engines-reference`. {tokens:,} tokens of held-out text of `eval/reference/deepseek-v3-mini`,
float32 asked for; {hardware}, shared with other work.

Δ is the engine's negative log-likelihood minus that of quantlab's runtime: its mean with the 95 % interval, the root mean square and the median of
absolute values, in nats per token. Noise is what the roundings that the criterion names change in quantlab's runtime, of which 1.5 times are allowed.

| variant | format | engine | verdict | mean Δ | rms | median | top-1 % | greedy % |
|---|---|---|---|--:|--:|--:|--:|--:|
{rows}

{reasons}
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path, help="what `quantlab run` made")
    parser.add_argument("out", type=Path, help="the page and the file, without suffix")
    parser.add_argument("--notes", type=Path, help="a file whose text ends the page")
    arguments = parser.parse_args()
    found = [
        (path.name, verdict)
        for path in sorted((arguments.run / "artifacts").iterdir())
        for verdict in read_verdicts(path)
    ]
    page = PAGE.format(
        tokens=max(verdict.tokens for _, verdict in found),
        hardware=found[0][1].hardware,
        rows="\n".join(row(name, verdict) for name, verdict in found),
        reasons="\n".join(told(name, verdict) for name, verdict in found),
    )
    if arguments.notes:
        page += "\n" + arguments.notes.read_text(encoding="utf-8")
    arguments.out.with_suffix(".md").write_text(page, encoding="utf-8")
    kept = [{"variant": name, **verdict.model_dump(mode="json", exclude={"key"})} for name, verdict in found]
    arguments.out.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def row(name: str, found: EngineVerdict) -> str:
    """A line of the table; a dash where nothing was computed."""
    mean = found.nll_difference
    cells = (
        f"`{name}`",
        found.format,
        f"{found.engine} {found.version}",
        found.verdict,
        "–" if mean is None else f"{mean.value:+.2g} ({mean.low:+.2g} to {mean.high:+.2g})",
        *("–" if value is None else f"{value:.2g}" for value in (found.nll_rms, found.nll_median)),
        *("–" if value is None else f"{100 * value:.2f}" for value in (found.top1_agreement, found.greedy_agreement)),
    )
    return f"| {' | '.join(cells)} |"


def told(name: str, found: EngineVerdict) -> str:
    """Criterion, reason and versions of a verdict."""
    versions = ", ".join(f"{package} {version}" for package, version in sorted(found.versions.items()))
    parts = (
        found.reason,
        found.weights,
        found.criterion and f"criterion: {found.criterion}",
        *found.replaced,
        versions,
    )
    return f"- `{name}`, {found.engine} on {found.format}: {'; '.join(filter(None, parts))}"


if __name__ == "__main__":
    main()
