"""Launches on the device of their tensors, whichever device is current; keys of the cache of compiled kernels."""

import ast
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quantlab.runtime.cuda import guard

CUDA = Path(guard.__file__).parent


@pytest.mark.parametrize(("file", "launches"), [("launch.py", 8), ("launch_step.py", 4)])
def test_every_launch_is_guarded(file: str, launches: int) -> None:
    functions = [node for node in ast.parse((CUDA / file).read_text()).body if isinstance(node, ast.FunctionDef)]
    launching = [node for node in functions if any(launches_a_kernel(part) for part in ast.walk(node))]
    assert len(launching) == launches
    for node in launching:
        assert "on_its_device" in {ast.unparse(each) for each in node.decorator_list}, node.name


def launches_a_kernel(node: ast.AST) -> bool:
    """Whether a node is ``kernel[grid](...)``."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)


def test_tensors_of_the_cpu_ask_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", None)
    doubled = guard.on_its_device(lambda x, *, by: x * by)
    assert torch.equal(doubled(torch.ones(2), by=2), torch.full((2,), 2.0))
    named = guard.on_its_device(lambda m: m.weight.sum())
    assert named(SimpleNamespace(weight=torch.ones(3))) == 3


@pytest.mark.parametrize(("index", "entered"), [(0, []), (1, [1])])
def test_another_device_is_made_the_current_one(
    index: int, entered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda number: (seen.append(number), nullcontext())[1])
    monkeypatch.setattr(guard, "device_index", lambda _: index)
    assert guard.on_its_device(lambda x: x + 1)(1) == 2
    assert seen == entered


def test_cache_keys_do_not_depend_on_the_first_launch() -> None:
    """Two processes that hash the kernels in different orders find each other's compiled kernels."""
    pytest.importorskip("triton")
    code = (
        "import sys; from quantlab.runtime.cuda import attend, kernels, launch, launch_step\n"
        "names = sys.argv[1:]; found = {name: vars(kernels)[name].cache_key for name in names}\n"
        "found['attend'] = attend.attend.cache_key; print(sorted(found.items()))"
    )
    names = ["product", "run_product"]
    answers = {
        subprocess.run([sys.executable, "-c", code, *order], capture_output=True, text=True, check=True).stdout
        for order in (names, names[::-1])
    }
    assert len(answers) == 1
