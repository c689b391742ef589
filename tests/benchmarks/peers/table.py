"""The judge's findings as a table for people and a file for programs."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantlab.evaluation.statistics import resample

Row = dict[str, object]
NOTES = Path(__file__).with_name("notes.md")
REFERENCE = "quantlab-rtn-absmax"
# columns of quantlab.evaluation.quality.measure.document_sums
TOKENS, KL = 0, 4
NAMES = {
    "bf16": "BF16 export (check)",
    "quantlab-rtn-absmax": "quantlab `rtn`, grid absmax",
    "quantlab-rtn": "quantlab `rtn`",
    "quantlab-rtn-activations": "quantlab `rtn`, clip activations",
    "quantlab-gptq": "quantlab `gptq`",
    "quantlab-awq": "quantlab `awq`",
    "llmcompressor-gptq": "llm-compressor GPTQ",
    "llmcompressor-gptq-mse": "llm-compressor GPTQ, observer mse",
    "llmcompressor-gptq-imatrix": "llm-compressor GPTQ, observer imatrix_mse",
    "llmcompressor-rtn-imatrix": "llm-compressor RTN, observer imatrix_mse",
    "llmcompressor-awq": "llm-compressor AWQ (16 of the 128 samples)",
    "gptqmodel-gptq": "GPTQModel GPTQ",
    "gptqmodel-gptq-mse": "GPTQModel GPTQ, mse 2.4",
    "autoround-opt-rtn": "auto-round, optimised RTN (iters 0)",
    "autoround-tuned": "auto-round, SignRound (iters 200)",
}


def write_table(results: dict[str, Row], strata: NDArray[np.int64], about: Row, out: Path) -> None:
    """Write OUT.md and OUT.json.

    Args:
        results: what the judge found of each row.
        strata: the domain of each document, for drawing documents.
        about: what all rows have in common.
        out: the path without suffix.
    """
    ordered = sorted((name for name in results if "quality" in results[name]), key=lambda name: kl(results[name])[0])
    for name in ordered:
        results[name]["kl_relative"] = relative(results[name], results[REFERENCE], strata)
    lines = [
        "# int4 in groups of 128 by quantlab and its peers, on the reference DeepSeek-V3",
        "",
        "| made by | KL to source, nats | KL relative to RTN absmax | perplexity change % | seconds | processor seconds | peak RSS, GB |",
        "|---|--:|--:|--:|--:|--:|--:|",
        *(line(name, results[name]) for name in ordered),
        "",
        f"{about['tokens']:,} held-out tokens of {about['documents']} documents (suite {about['suite']}); in brackets 95 % "
        "intervals, documents drawn once for all rows. Hardware: " + str(about["hardware"]) + ".",
        "",
        *left_out(results),
        "## What each quantized",
        "",
        "Weight matrices quantized of those there are. Wanted: all but kv_b_proj, the router, embeddings and head.",
        "",
        *coverage({name: results[name] for name in ordered}),
        "",
        "## Versions",
        "",
        *(f"- {NAMES.get(name, name)}: {versions(results[name])}" for name in ordered if results[name]["run"]),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n".join([*lines, "", NOTES.read_text().rstrip()]) + "\n")
    kept = {name: {key: value for key, value in row.items() if key != "sums"} for name, row in results.items()}
    out.with_suffix(".json").write_text(json.dumps({"about": about, "rows": kept}, indent=1) + "\n")


def kl(row: Row) -> tuple[float, float, float]:
    """KL with its interval."""
    measured = row["quality"]["kl_to_baseline"]
    return measured["value"], measured["low"], measured["high"]


def relative(row: Row, reference: Row, strata: NDArray[np.int64]) -> Row:
    """The ratio of two KLs, both summed over the same drawn documents."""
    own, other = np.array(row["sums"]), np.array(reference["sums"])
    seen = other[:, TOKENS] > 0
    table = np.stack([own[seen, KL], other[seen, KL]], axis=1)
    tokens = int(other[:, TOKENS].sum())
    return resample(table, strata[seen]).measure(lambda sums: sums[..., 0] / sums[..., 1], n=tokens).model_dump()


def line(name: str, row: Row) -> str:
    """One row of the main table."""
    value, low, high = kl(row)
    ratio, change, run = row["kl_relative"], row["quality"]["perplexity_change_percent"], row["run"]
    seconds = f"{run['quantize_seconds']:.0f} | {run['processor_seconds']:.0f}" if run else "– | –"
    memory = f"{run['peak_rss_bytes'] / 1e9:.2f}" if run else "–"
    return (
        f"| {NAMES.get(name, name)} | {value:.4f} ({low:.4f} to {high:.4f}) "
        f"| {ratio['value']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}) "
        f"| {change['value']:.2f} ({change['low']:.2f} to {change['high']:.2f}) | {seconds} | {memory} |"
    )


def left_out(results: dict[str, Row]) -> list[str]:
    """The rows that could be and are not, so that nobody takes silence for a result."""
    names = [name for key, name in NAMES.items() if "quality" not in results.get(key, {})]
    return [f"Not in the table, because not run or not judged: {'; '.join(names)}.", ""] if names else []


def coverage(results: dict[str, Row]) -> list[str]:
    """The table of what was quantized, by role."""
    roles = sorted({role for row in results.values() for role in row["found"]["modules"]})
    lines = ["| | " + " | ".join(roles) + " | other weights changed |", "|---|" + "--:|" * (len(roles) + 1)]
    for name, row in results.items():
        counts = [row["found"]["modules"].get(role, {"quantized": 0, "not": 0}) for role in roles]
        cells = [f"{count['quantized']} / {count['quantized'] + count['not']}" for count in counts]
        lines.append(f"| {NAMES.get(name, name)} | " + " | ".join(cells) + f" | {len(row['found']['changed'])} |")
    return lines


def versions(row: Row) -> str:
    """The versions that made an artifact, in one line."""
    return ", ".join(f"{package} {version}" for package, version in row["run"]["versions"].items())
