"""Damaged configs and recipes: `plan` accepts them or raises an error of quantlab, never another exception."""

import contextlib
import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from quantlab.architectures.detect import of_model_type
from quantlab.checkpoint.index import Checkpoint, open_checkpoint
from quantlab.errors import QuantlabError
from quantlab.plan.compile import compile_plan
from quantlab.recipe.load import load_recipe
from quantlab.recipe.schema import Recipe
from quantlab.runtime.modules.build import config_of
from tests.checkpoints import CONFIGS

EXAMPLES: Final = settings(
    max_examples=2000,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
REMOVED: Final = object()
DEEP: Final = json.loads("[" * 50 + "]" * 50)
VALUES: Final[tuple[Any, ...]] = (
    REMOVED, None, 0, -1, 1, 2, 3, 5, 7, 10**9, 10**30, 0.0, 0.5, -0.5, 1e308, float("inf"), float("nan"), True, False,
    "", "x", "128", "silu", "softmax", "sigmoid", "greedy", "noaux_tc", "\ud800", [], [1], [[]], ["x"], [128, 128], [0, 0],
    [True, True], ["full_attention"] * 3, ["sliding_attention"] * 3, {}, {"x": 1}, {"rope_type": "yarn", "factor": 0},
    {"quant_method": "fp8"}, {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": 5}, DEEP,
)  # fmt: skip
RECIPE: Final = Recipe.model_validate(
    {
        "model": "m",
        "variants": {
            "int8": [{"cast": "float16"}, {"quantize": "int8"}],
            "w4": [{"prune": "2:4"}, {"quantize": "int4_g64", "targets": ["attention"]}],
        },
    }
)


def damage(config: dict[str, Any], changes: list[tuple[str, Any]]) -> dict[str, Any]:
    """A copy of a config.json with other values; a dot in a key leads into a mapping."""
    changed = copy.deepcopy(config)
    for key, value in changes:
        first, _, rest = key.partition(".")
        place, name = (changed, first) if not rest else (changed.get(first), rest)
        if not isinstance(place, dict):
            continue
        if value is REMOVED:
            place.pop(name, None)
        else:
            place[name] = value
    return changed


def refusal(call: Callable[[], None]) -> QuantlabError | None:
    """The error of quantlab that a call raises, whole and printable; None if it raises none."""
    try:
        call()
    except QuantlabError as error:
        found = error
    else:
        return None
    assert found.what, found
    assert found.found, found
    assert found.fix, found
    assert "at most 0" not in found.fix, found
    assert str(found).encode()
    return found


def keys_of(family: str, config: dict[str, Any]) -> list[str]:
    """Every key that the family declares, under all its names, and every key of the config."""
    architecture = of_model_type(family)
    assert architecture is not None
    declared = [name for field in architecture.fields.fields for name in (field.name, *field.aliases)]
    inside = [f"quantization_config.{key}" for key in config.get("quantization_config", {})]
    return sorted({*declared, *config, *inside, "quantization_config", "rope_scaling.type"})


@pytest.fixture(scope="module")
def planned(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, dict[str, Any]], None]:
    """Plan the tiny checkpoint of a family with another config.json."""
    root = tmp_path_factory.mktemp("damaged")
    for family, directory in checkpoints.items():
        (root / family).mkdir()
        for path in directory.iterdir():
            if path.name != "config.json":
                os.link(path, root / family / path.name)

    def plan(family: str, config: dict[str, Any]) -> None:
        (root / family / "config.json").write_text(json.dumps(config))
        compile_plan(RECIPE, open_checkpoint(root / family))

    return plan


@pytest.fixture(scope="module")
def configs(checkpoints: dict[str, Path]) -> dict[str, dict[str, Any]]:
    return {family: json.loads((directory / "config.json").read_text()) for family, directory in checkpoints.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_no_config_ends_in_a_traceback(
    family: str, planned: Callable[[str, dict[str, Any]], None], configs: dict[str, dict[str, Any]]
) -> None:
    """One to three changes at a time."""
    keys = keys_of(family, configs[family])
    outcomes = {"planned": 0, "refused": 0}

    @EXAMPLES
    @given(st.lists(st.tuples(st.sampled_from(keys), st.sampled_from(VALUES)), min_size=1, max_size=3))
    def run(changes: list[tuple[str, Any]]) -> None:
        error = refusal(lambda: planned(family, damage(configs[family], changes)))
        outcomes["planned" if error is None else "refused"] += 1

    run()
    assert min(outcomes.values()) > 100, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_transformers_makes_a_model_of_every_config_that_plans(
    family: str, planned: Callable[[str, dict[str, Any]], None], configs: dict[str, dict[str, Any]]
) -> None:
    """One change at a time; `model_type` chooses another family, and the dtype is given to the model."""
    made = 0
    for key in keys_of(family, configs[family]):
        for value in VALUES if key not in {"model_type", "torch_dtype"} else ():
            config = damage(configs[family], [(key, value)])
            try:
                planned(family, config)
            except QuantlabError:
                continue
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config_of(config, where="config.json"), dtype=torch.float32)
            assert len(model.model.layers) == configs[family]["num_hidden_layers"]
            made += 1
    assert made > 50


COMMON: Final[dict[str, Any]] = {
    "model": "m",
    "calibration": {
        "corpus": "c.jsonl", "samples": 4, "length": 16, "seed": 0, "propagate": "quantized", "dtype": "float32", "memory": "1 GB",
    },
    "evaluate": {"suite": "s.yaml", "baseline": "source", "claims": "c.yaml"},
}  # fmt: skip
DOCUMENTS: Final[dict[str, dict[str, Any]]] = {
    "llama": COMMON | {
        "variants": {
            "gptq": [{"quantize": "int4_g64", "targets": ["attention"], "algorithm": {"name": "gptq", "refine": 2, "damping": 0.1}}],
            "awq": [{"quantize": "int8_weight", "ignore": ["*.down_proj"], "algorithm": {"name": "awq", "steps": 3, "clip": "mse"}}],
        },
    },
    "deepseek_v2": COMMON | {
        "variants": {
            "smooth": [{"cast": "float16"}, {"quantize": "int8", "algorithm": {"name": "smoothquant", "alpha": 0.5}}],
            "reap": [{"prune": 0.5, "algorithm": {"name": "reap"}}, {"prune": "2:4", "algorithm": {"name": "sparsegpt"}, "targets": ["kv_b"]}],
        },
    },
}  # fmt: skip
"""A recipe for each of two families; together they have every key."""
WORDS: Final[tuple[Any, ...]] = (
    *VALUES, "int4_g128", "int8", "float16", "reap", "gptq", "rtn", "magnitude", "2:4", "1:128", "0:4", "9" * 5000, "1e-2", ".inf",
    "\x00", "a/b@c", "x" * 300, "[", "*", ["routed_experts"], ["attention", "kv_b"], ["router"], {"name": "reap"}, {"name": "gptq"},
    {"name": None}, {"name": []}, {"name": "rtn", "rounds": 1}, [{"cast": "float16"}], [{"prune": 0.9}], 0.999, 1e-9,
)  # fmt: skip


def places(node: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every value below a document."""
    members = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in members:
        yield (*path, key)
        yield from places(value, (*path, key))


def rewrite(document: dict[str, Any], changes: list[tuple[tuple[str | int, ...], Any, str | None]]) -> dict[str, Any]:
    """A copy with other values at some places, and other keys where a new name is given."""
    changed = copy.deepcopy(document)
    for path, value, name in changes:
        place: Any = changed
        with contextlib.suppress(KeyError, IndexError, TypeError):
            for part in path[:-1]:
                place = place[part]
            place[path[-1]]
            if value is REMOVED:
                del place[path[-1]]
            elif name is not None and isinstance(place, dict):
                place[name] = place.pop(path[-1])
            else:
                place[path[-1]] = copy.deepcopy(value)
    return changed


@pytest.mark.slow
@pytest.mark.parametrize("family", DOCUMENTS)
def test_no_recipe_ends_in_a_traceback(family: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint, path = open_checkpoint(checkpoints[family]), tmp_path / "recipe.yaml"
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n')
    names = st.sampled_from([None, None, None, "x", "name", "rounds", "", "source", "prune", "\u00e9", "a b", "y" * 99])
    everywhere = st.sampled_from(sorted(places(DOCUMENTS[family]), key=repr))
    outcomes = {"planned": 0, "refused": 0}

    @EXAMPLES
    @given(st.lists(st.tuples(everywhere, st.sampled_from(WORDS), names), min_size=1, max_size=2))
    def run(changes: list[tuple[tuple[str | int, ...], Any, str | None]]) -> None:
        error = refusal(lambda: attempt(rewrite(DOCUMENTS[family], changes), path, checkpoint))
        outcomes["planned" if error is None else "refused"] += 1

    run()
    assert min(outcomes.values()) > 20, outcomes


def attempt(document: dict[str, Any], path: Path, checkpoint: Checkpoint) -> None:
    """Write, load and compile a recipe."""
    path.write_text(
        json.dumps(document).replace("Infinity", ".inf").replace("NaN", ".nan")
    )  # JSON is YAML but for these
    loaded = load_recipe(path)
    assert loaded.hub_id is None or loaded.hub_id[0]
    compile_plan(loaded.recipe, checkpoint, corpus_sha256=loaded.corpus_sha256())
