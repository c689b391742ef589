"""Finished artifacts of tiny checkpoints, for the tests of exports."""

from pathlib import Path

from quantlab.checkpoint.index import open_checkpoint
from quantlab.plan.compile import compile_plan
from quantlab.recipe.load import load_recipe
from quantlab.run.directory import RunDirectory
from quantlab.run.execute import make_artifacts


def make_artifact(checkpoint: Path, passes: str, root: Path, *, name: str = "variant") -> Path:
    """Make one artifact of a checkpoint, for example with the passes "[{quantize: int4_g128}]"; returns its directory."""
    root.mkdir(parents=True, exist_ok=True)
    recipe = root / f"{name}.yaml"
    recipe.write_text(f"model: {checkpoint}\nvariants:\n  {name}: {passes}\n")
    loaded = load_recipe(recipe)
    directory = RunDirectory(root / "out")
    plan = compile_plan(loaded.recipe, open_checkpoint(checkpoint))
    make_artifacts(plan, loaded, directory, lambda _: lambda _: None)
    return directory.artifact(name)
