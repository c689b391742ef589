"""Finished artifacts of tiny checkpoints, for the tests of exports."""

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from quantlab.architectures.detect import detect
from quantlab.checkpoint.index import open_checkpoint
from quantlab.formats.contents import Weight
from quantlab.plan.compile import compile_plan
from quantlab.recipe.load import load_recipe
from quantlab.recipe.schemes import SCHEMES, SchemeName
from quantlab.run.directory import RunDirectory
from quantlab.run.execute import make_artifacts
from tests.checkpoints import CONFIGS


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


def with_tokenizer(checkpoint: Path, target: Path) -> Path:
    """A copy of a tiny checkpoint with a tokenizer of the words w1 … w383, for programs that load no model without one."""
    shutil.copytree(checkpoint, target)
    tokenizer = Tokenizer(WordLevel({"<unk>": 0} | {f"w{n}": n for n in range(1, 384)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "w1"}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return target


def weight(name: str, shape: tuple[int, ...], *, scheme: SchemeName | None = None, dtype: str = "BF16") -> Weight:
    """A weight of a tiny DeepSeek-V3, as a format sees it."""
    config = CONFIGS["deepseek_v3"]
    tensor = detect(config).classify(name, hidden_layers=config["num_hidden_layers"])
    if scheme is None:
        return Weight(tensor, shape, None, "dense", dtype)
    return Weight(tensor, shape, SCHEMES[scheme].format, SCHEMES[scheme].layout, dtype)
