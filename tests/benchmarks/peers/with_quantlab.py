"""quantlab, measured like the others: one artifact in a process of its own, from the same BF16 checkpoint and tokens.

Its seconds include reading the checkpoint and writing the artifact, which it does as it goes.
"""

import shutil
from pathlib import Path

import torch
from measured import Task, parse_task, report

from quantlab.calibration.corpus import sample_tokens
from quantlab.checkpoint.index import open_checkpoint
from quantlab.plan.compile import compile_plan
from quantlab.recipe.load import load_recipe
from quantlab.run.directory import RunDirectory
from quantlab.run.execute import make_artifacts

ALGORITHMS = {
    "rtn-absmax": "{name: rtn, grid: absmax, clip: none}",
    "rtn": "{name: rtn, clip: none}",
    "rtn-activations": "{name: rtn, clip: activations}",
    "gptq": "{name: gptq}",
    "awq": "{name: awq}",
}
CORPUS = Path(__file__).resolve().parents[3] / "eval/corpora/calibration.jsonl"


def main() -> None:
    task = parse_task(tuple(ALGORITHMS))
    samples, length = task.tokens.shape
    assert torch.equal(sample_tokens(CORPUS, task.model, samples=samples, length=length, seed=0), task.tokens)
    work = task.out.with_name(task.out.name + "-run")
    report(task, lambda: make(task, work), lambda: keep(work, task.out))


def make(task: Task, work: Path) -> None:
    """Write the recipe of the one artifact and make it."""
    samples, length = task.tokens.shape
    path = task.out.with_suffix(".yaml")
    path.write_text(
        f"model: {task.model}\n"
        f"calibration: {{corpus: {CORPUS}, samples: {samples}, length: {length}, seed: 0}}\n"
        f"variants:\n  made: [{{quantize: int4_g128, algorithm: {ALGORITHMS[task.variant]}}}]\n"
    )
    loaded = load_recipe(path)
    source = open_checkpoint(task.model)
    plan = compile_plan(loaded.recipe, source, corpus_sha256=loaded.corpus_sha256())
    make_artifacts(plan, loaded, RunDirectory(work), lambda _: lambda _: None)


def keep(work: Path, out: Path) -> None:
    """Put the artifact where the judge looks for it."""
    shutil.rmtree(out, ignore_errors=True)
    (work / "artifacts/made").rename(out)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
