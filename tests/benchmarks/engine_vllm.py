"""What vLLM's CPU build computes of quantlab's artifacts: small models of every family, every scheme, the same tokens in both.

Random models with MLA's true head sizes (`tests/engines/models.py`) are quantized, run by the script that judges with vLLM, in float32, and
compared with quantlab's runtime in float32. An artifact that needs a kernel which this build lacks on this CPU is run again with
plain torch in place of those products. The source of a family is run first. Results in WORK are kept and not computed again.

    python tests/benchmarks/engine_vllm.py --python ENVIRONMENT/bin/python --work WORK --out eval/results/engines-vllm
"""

import argparse
import json
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlab.evaluation.engines.scripts import vllm as script
from quantlab.runtime.load import load
from tests.engines.models import FAMILIES, VARIANTS, make_model, make_variants, variants_of

NATS = 1e-4
"""Root mean square of the differences a token, up to which two programs agree on the same weights in float32."""
NOISE = 1.5
"""The same for rounded inputs, in units of what rounding them changes."""
PLACES = ("source", *VARIANTS)
PROMPT, NEW = 16, 16


@dataclass(frozen=True)
class Row:
    """One artifact of one family.

    Attributes:
        family, variant: which.
        verdict: agrees, differs, refuses or not here; of the run with plain torch if there was one, and None if it was not run.
        rms, mean: of the differences of nll, vLLM less quantlab, in nats a token.
        noise: root mean square that rounding the inputs to int8 changes in quantlab; None for other schemes.
        top1, greedy: fraction of equal most probable tokens, given the text and continuing it.
        alone: what vLLM said without plain torch; None if it ran.
        schemes: scheme and kernel of linears, experts and attention.
        replaced: products in plain torch.
        missing, unexpected: parameters that no tensor filled, tensors that filled nothing.
    """

    family: str
    variant: str
    verdict: str | None
    rms: float | None = None
    mean: float | None = None
    noise: float | None = None
    top1: float | None = None
    greedy: float | None = None
    alone: str | None = None
    schemes: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


def documents() -> list[list[int]]:
    return torch.randint(5, 500, (6, 64), generator=torch.Generator().manual_seed(0)).tolist()


def artifacts_of(family: str, work: Path, *, make: bool) -> dict[str, Path]:
    """The source and the artifacts of a family; those that are not there are made, or left out."""
    model, out = work / "models" / family, work / "models" / f"{family}-run"
    names = variants_of(family)
    if make and not model.is_dir():
        make_model(model, family)
    if make and not out.is_dir():
        make_variants(model, out, names)
    places = {"source": model} | {name: out / "run" / "artifacts" / name for name in names}
    return {name: place for name, place in places.items() if (place / "config.json").is_file()}


def ours(artifact: Path, kept: Path) -> dict[str, Tensor]:
    """nll, most probable tokens and continuations by quantlab's runtime."""
    if kept.is_file():
        return load_file(kept)
    model = load(artifact, dtype=torch.float32)
    nll, top, greedy = [], [], []
    with torch.inference_mode():
        for ids in documents():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
            nll.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none"))
            top.append(logits.argmax(dim=-1))
        for ids in documents()[:2]:
            new: list[int] = []
            while len(new) < NEW and 1 not in new:
                new.append(int(model(input_ids=torch.tensor([ids[:PROMPT] + new])).logits[0, -1].argmax()))
            greedy.append(new + [-1] * (NEW - len(new)))
    kept.parent.mkdir(parents=True, exist_ok=True)
    save_file({"nll": torch.cat(nll), "top": torch.cat(top), "greedy": torch.tensor(greedy)}, kept)
    return load_file(kept)


def run(python: str | None, model: Path, directory: Path, *, replace: bool) -> int | None:
    """Run the script, unless its exit code is kept; returns the code, None if there is neither."""
    code = directory.with_name(directory.name + ".done")
    if python is None and not code.is_file():
        return None
    if not code.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        greedy = {"prompts": [ids[:PROMPT] for ids in documents()[:2]], "tokens": NEW}
        request = {"model": str(model), "dtype": "float32", "threads": 1, "documents": documents(), "greedy": greedy, "speed": None, "probes": None, "options": {"replace": replace}}  # fmt: skip
        (directory / "request.json").write_text(json.dumps(request))
        command = [python, script.__file__, str(directory / "request.json"), str(directory)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
        (directory / "stdout").write_text(done.stdout)
        (directory / "stderr").write_text(done.stderr)
        code.write_text(str(done.returncode))
    return int(code.read_text())


def said(directory: Path, code: int) -> str:
    """The line that explains a failure."""
    stream = "stdout" if code == script.NOT_HERE else "stderr"
    lines = [line for line in (directory / stream).read_text().splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit code {code}"


def judged(family: str, variant: str, work: Path, python: str | None, artifact: Path) -> Row:
    """Run one artifact, with plain torch if vLLM lacks a kernel."""
    directory = work / "out" / f"{family}.{variant}"
    code = run(python, artifact, directory, replace=False)
    alone = said(directory, code) if code else None
    if code != 0:
        plain = work / "out" / f"{family}.{variant}.replace"
        again = run(python, artifact, plain, replace=True)
        if again is not None:
            code, directory = again, plain
    if code is None:
        return Row(family, variant, None)
    if code:
        verdict = "not here" if code == script.NOT_HERE else "refuses"
        return Row(family, variant, verdict, alone=said(directory, code))
    expected = ours(artifact, work / "ours" / f"{family}.{variant}.safetensors")
    noise = None
    if variant == "int8":  # the same integers without rounded inputs
        weight_only = ours(artifact.with_name("int8_weight"), work / "ours" / f"{family}.int8_weight.safetensors")
        noise = rms_of(expected["nll"] - weight_only["nll"])
    return compared(Row(family, variant, "differs", noise=noise, alone=alone), directory, expected)


def rms_of(x: Tensor) -> float:
    return float(x.double().pow(2).mean().sqrt())


def compared(row: Row, directory: Path, expected: dict[str, Tensor]) -> Row:
    """The row with vLLM's numbers against quantlab's."""
    found, report = load_file(directory / "result.safetensors"), json.loads((directory / "result.json").read_text())
    difference = found["nll"] - expected["nll"]
    rms = rms_of(difference)
    whole = not report["missing"] and not report["unexpected"]
    limit = NATS if row.noise is None else NOISE * row.noise
    kinds = {
        f"{kind['scheme'] or kind['module']}{': ' + kind['kernel'] if kind['kernel'] else ''}"
        for kind in report["modules"]
        if "Embedding" not in (kind["scheme"] or "")
    }
    return Row(
        family=row.family,
        variant=row.variant,
        verdict="agrees" if whole and rms <= limit else "differs",
        rms=rms,
        mean=float(difference.double().mean()),
        noise=row.noise,
        top1=float((found["top"] == expected["top"]).double().mean()),
        greedy=float((found["greedy"] == expected["greedy"]).double().mean()),
        alone=row.alone,
        schemes=tuple(sorted(kinds)),
        replaced=tuple(report["replaced"]),
        missing=tuple(report["missing"]),
        unexpected=tuple(report["unexpected"]),
    )


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def cell(row: Row) -> str:
    """One cell of the table of verdicts."""
    if row.rms is None:
        return row.verdict or "not run"
    noise = "" if row.noise is None else f", {row.rms / row.noise:.1f}x the noise"
    mark = " †" if row.replaced else ""
    return f"{row.verdict}{mark} ({row.rms:.1e}{noise})"


def table(rows: list[Row], versions: dict[str, str], command: str) -> str:
    """The page."""
    found = {(row.family, row.variant): row for row in rows}
    lines = [
        "# vLLM's CPU build on quantlab's artifacts",
        "",
        "Written by `tests/benchmarks/engine_vllm.py`; random models of two or three layers with MLA's true head sizes, float32, 6 texts of 64",
        "tokens. A cell has the verdict and the root mean square of the differences of nll, in nats a token. `agrees`: every parameter",
        f"filled, every tensor used, at most {NATS:g}, or for rounded inputs (int8) at most {NOISE} times what rounding them changes.",
        "`not here`: this build has no kernel for it on this CPU. †: it has none, and plain torch multiplied what vLLM had loaded.",
        "",
        f"{cpu_name()}; {', '.join(f'{name} {version}' for name, version in versions.items())}; `{command}`.",
        "",
        f"| artifact | {' | '.join(FAMILIES)} |",
        f"|---|{'---|' * len(FAMILIES)}",
    ]
    for variant in PLACES:
        cells = [cell(found[family, variant]) if (family, variant) in found else "–" for family in FAMILIES]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    ran = [row for row in rows if row.rms is not None]
    lines += [
        "",
        "| family | artifact | top-1 | greedy | schemes and kernels | in plain torch |",
        "|---|---|---|---|---|---|",
    ]
    for row in ran:
        schemes, replaced = ", ".join(f"`{kind}`" for kind in row.schemes), ", ".join(row.replaced) or "–"
        lines.append(f"| {row.family} | {row.variant} | {row.top1:.4f} | {row.greedy:.4f} | {schemes} | {replaced} |")
    lines += ["", "What vLLM said where it had no kernel:", ""]
    for message in dict.fromkeys(row.alone for row in rows if row.alone):
        which = ", ".join(f"{row.family} {row.variant}" for row in rows if row.alone == message)
        lines.append(f"- {which}: `{message}`")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="Python of an environment with vLLM; without it, only kept results are shown")
    parser.add_argument("--work", type=Path, required=True, help="models and results are kept there")
    parser.add_argument("--out", type=Path, required=True, help="the page and its numbers, without suffix")
    options = parser.parse_args()
    rows: list[Row] = []
    for family in FAMILIES:
        for variant, artifact in artifacts_of(family, options.work, make=options.python is not None).items():
            rows.append(judged(family, variant, options.work, options.python, artifact))
            if variant == "source" and rows[-1].verdict not in {"agrees", None}:
                break  # whatever is wrong with the source says nothing about artifacts
    reports: list[dict[str, Any]] = [
        json.loads(path.read_text()) for path in sorted((options.work / "out").glob("*/result.json"))
    ]
    versions = reports[0]["versions"] if reports else {}
    command = f"python tests/benchmarks/engine_vllm.py --python ENVIRONMENT/bin/python --work WORK --out {options.out}"
    options.out.with_suffix(".md").write_text(table(rows, versions, command))
    numbers = {"cpu": cpu_name(), "versions": versions, "rows": [asdict(row) for row in rows]}
    options.out.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
