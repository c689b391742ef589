"""Compare the artifacts of two checkouts byte for byte: for a change of the code that must not change a number.

    python tests/benchmarks/same_bytes.py /path/to/other/checkout [--keep DIR] [--only llama]

Both checkouts make the artifacts of the same recipes in processes of their own: every algorithm on a tiny checkpoint of every
family, and the shipped quickstart on the reference model. Weights, config.json and the index have to be equal, and so has the
ledger of manifest.json as far as the older one goes. Calibrated sums depend on the CPU, so both sides run here and now; with
`--keep` the artifacts of the other checkout stay in a directory and are not made a second time.

The exit status is 1 if a file differs or is missing.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.checkpoints import CONFIGS, make_checkpoint  # noqa: E402
from tests.run.test_calibrated import with_tokenizer, write_corpus  # noqa: E402

VARIANTS = """\
  fp16: [{cast: float16}]
  int8: [{quantize: int8}]
  int8-weight: [{quantize: int8_weight}]
  rtn: [{quantize: int4_g64, algorithm: {name: rtn, clip: none}}]
  mse: [{quantize: int4_g128, targets: [dense_mlp], algorithm: {name: rtn, clip: mse}}]
  gptq: [{quantize: int4_g128, algorithm: {name: gptq}}]
  plain-gptq: [{quantize: int4_g32, algorithm: {name: gptq, correction: 0, refine: 0, order: columns}}]
  clip: [{quantize: int4_g64, algorithm: {name: rtn, clip: activations}}]
  awq: [{quantize: int4_g128, algorithm: {name: awq, steps: 4}}]
  smooth: [{quantize: int8, algorithm: {name: smoothquant}}]
  magnitude: [{cast: float16}, {prune: 0.2}]
  wanda: [{cast: float16}, {prune: 0.3, algorithm: {name: wanda}}]
  sparse: [{prune: 2:4, algorithm: {name: sparsegpt}}]
  joint: [{prune: 0.5, algorithm: {name: sparsegpt}}, {quantize: int4_g128, algorithm: {name: gptq}}]
"""
EXPERTS = """\
  experts: [{quantize: int4_g128, targets: [routed_experts], algorithm: {name: gptq}}, {quantize: int8, targets: [attention]}]
  reap: [{prune: 0.5, algorithm: {name: reap}}]
  reap-awq: [{prune: 0.5, algorithm: {name: reap}}, {quantize: int4_g128, algorithm: {name: awq, steps: 2}}]
"""
FEWER = EXPERTS.replace("prune: 0.5", "prune: 0.25")


def recipes(directory: Path) -> dict[str, Path]:
    """Recipes without an evaluation by name, with their checkpoints below `directory`."""
    found = {}
    corpus = write_corpus(directory / "text.jsonl")
    for family in CONFIGS:
        model = with_tokenizer(make_checkpoint(directory / "models" / family, family))
        for propagate in ("quantized", "original"):
            calibration = f"{{corpus: {corpus}, samples: 16, length: 32, propagate: {propagate}}}"
            more = "" if family in {"llama", "qwen2", "qwen3"} else FEWER if family == "deepseek_v2" else EXPERTS
            # groups of two experts keep both: a routing group is judged by its two best
            more = "\n".join(line for line in more.splitlines() if family != "deepseek_v3" or "reap" not in line) + "\n"
            path = directory / f"{family}-{propagate}.yaml"
            path.write_text(f"model: {model}\ncalibration: {calibration}\nvariants:\n{VARIANTS}{more}")
            found[path.stem] = path
    text = (ROOT / "recipes" / "quickstart.yaml").read_text()
    for name, place in (
        ("deepseek-v3-mini", "eval/reference/deepseek-v3-mini"),
        ("builtin", "eval/corpora/calibration.jsonl"),
    ):
        text = text.replace(name, str(ROOT / place))  # older checkouts know no names
    path = directory / "quickstart.yaml"
    path.write_text("\n".join(line for line in text.splitlines() if not line.startswith("evaluate:")) + "\n")
    return {**found, "quickstart": path}


def make(checkout: Path, recipe: Path, out: Path) -> None:
    """Make the artifacts of a recipe with the code of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "quantlab", "run", str(recipe), "--out", str(out), "--quiet"]
    subprocess.run(command, check=True, cwd=checkout, env=environment)


def contents(artifact: Path) -> dict[str, str]:
    """Hashes of the files that have to be equal."""
    files = [*artifact.glob("*.safetensors"), artifact / "config.json", artifact / "model.safetensors.index.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def differences(old: Path, new: Path) -> list[str]:
    """What differs between the artifacts of one variant."""
    before, after = contents(old), contents(new)
    found = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    ledgers = [json.loads((artifact / "manifest.json").read_text())["ledger"] for artifact in (old, new)]
    if len(ledgers[0]) != len(ledgers[1]):
        return [*found, "ledger"]
    for line, other in zip(*ledgers, strict=True):
        found += [f"ledger of {line['tensor']}: {key}" for key in line if line[key] != other.get(key)]
    return found


def main() -> int:
    """Compare, and print a line for every recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="a checkout of the code to compare with")
    parser.add_argument("--keep", type=Path, help="directory for checkpoints and for artifacts of the other checkout")
    parser.add_argument("--only", default="", help="recipes whose names contain this")
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        kept, made = (options.keep or Path(temporary) / "kept").resolve(), Path(temporary) / "made"
        listed = kept / "recipes.json"
        if not listed.is_file():
            kept.mkdir(parents=True, exist_ok=True)
            listed.write_text(json.dumps({name: str(path) for name, path in recipes(kept).items()}))
        for name, path in json.loads(listed.read_text()).items():
            if options.only not in name:
                continue
            make(options.other.resolve(), Path(path), kept / "out" / name)
            make(ROOT, Path(path), made / name)
            variants = sorted(folder.name for folder in (kept / "out" / name / "artifacts").iterdir())
            found = {
                variant: differences(*(base / name / "artifacts" / variant for base in (kept / "out", made)))
                for variant in variants
            }
            wrong = {variant: files for variant, files in found.items() if files}
            failed = failed or bool(wrong)
            print(f"{name}: {len(variants)} variants, {len(wrong)} differ", flush=True)
            for variant, files in wrong.items():
                print(f"  {variant}: {', '.join(files[:5])}{' …' if len(files) > 5 else ''}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
