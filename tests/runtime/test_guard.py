"""Launches happen on the device of their tensors, whichever is the current one."""

import ast
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quantlab.runtime.cuda import guard

CUDA = Path(guard.__file__).parent


def test_every_launch_is_guarded() -> None:
    tree = ast.parse((CUDA / "launch.py").read_text())
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    guarded = [node.name for node in public if "on_its_device" in {ast.unparse(each) for each in node.decorator_list}]
    assert [node.name for node in public if node.name not in guarded] == ["chip"]
    assert len(guarded) >= 7


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
