"""quantlab beside its peers on one checkpoint: the same weights, calibration tokens, groups and layers, one judge.

    python tests/benchmarks/peers/run.py --work peers-work

Run it with quantlab's own environment. Every peer gets an environment of its own under WORK/environments, is run as a
process, and is skipped (and named) when it fails. What is already there is kept: delete WORK/artifacts/<row> to make it
again. Ends in eval/results/peers-deepseek-v3-mini.md and .json.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
TORCH = "torch==2.13.0"  # named to pip so that no peer pulls another one
REQUIREMENTS = {
    "llmcompressor": ("llmcompressor==0.14.0.1",),
    "gptqmodel": ("gptqmodel==7.6.0",),
    "autoround": ("auto-round==0.16.1", "transformers==5.23.0", "compressed-tensors==0.20.0"),
}
VARIANTS = {
    "quantlab": ("rtn-absmax", "rtn", "rtn-activations", "gptq", "awq"),
    "llmcompressor": ("gptq", "gptq-mse", "gptq-imatrix", "rtn-imatrix", "awq"),
    "gptqmodel": ("gptq", "gptq-mse"),
    "autoround": ("opt-rtn", "tuned"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("peers-work"))
    parser.add_argument("--model", type=Path, default=ROOT / "eval/reference/deepseek-v3-mini")
    parser.add_argument("--peers", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=ROOT / "eval/results/peers-deepseek-v3-mini")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    (work / "artifacts").mkdir(parents=True, exist_ok=True)
    if not (work / "bf16").is_dir():
        call(sys.executable, HERE / "prepare.py", arguments.model, work)
    failed = []
    for peer in arguments.peers:
        python = interpreter(peer, work / "environments" / peer)
        failed += [f"{peer}-{variant}" for variant in VARIANTS[peer] if not make(peer, variant, python, work)]
    call(sys.executable, HERE / "judge.py", arguments.model, work, arguments.out)
    print("failed: " + (", ".join(failed) or "none"))


def interpreter(peer: str, environment: Path) -> str:
    """The Python of a peer; makes its environment where there is none."""
    if peer == "quantlab":
        return sys.executable
    python = environment / "bin/python"
    if not (environment / "complete").is_file():
        call(sys.executable, "-m", "venv", environment)
        call(python, "-m", "pip", "install", "--quiet", TORCH, *REQUIREMENTS[peer])
        (environment / "complete").touch()
    return str(python)


def make(peer: str, variant: str, python: str, work: Path) -> bool:
    """One artifact in a process of its own; whether it is there. What the process prints is in its log."""
    out = work / "artifacts" / f"{peer}-{variant}"
    if (out.with_name(out.name + ".json")).is_file():
        return True
    settings = {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    command = [python, HERE / f"with_{peer}.py", variant, "--model", work / "bf16", "--tokens", work / "tokens.pt"]
    with out.with_name(out.name + ".log").open("w") as log:
        done = subprocess.run([*command, "--out", out], stdout=log, stderr=log, env=os.environ | settings, cwd=work)
    return done.returncode == 0


def call(*command: object) -> None:
    """Run a command and stop if it fails."""
    subprocess.run([str(part) for part in command], check=True)


if __name__ == "__main__":
    main()
