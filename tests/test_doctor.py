"""`quantlab doctor` says what this machine has, and tells the same as the code that decides."""

import json

import pytest
import torch
from typer.testing import CliRunner

from quantlab.cli import app
from quantlab.runtime.cpu_operators import cpu_operators
from quantlab.version import VERSION


def test_it_tells_what_the_runtime_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTLAB_VLLM_PYTHON", "/no/such/python")
    monkeypatch.setenv("HF_TOKEN", "hf_secret_token")
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    kernels, *replaced = cpu_operators()
    assert told["processor"]["kernels"] == kernels
    assert [text for name, text in told["processor"].items() if name.startswith("replaced")] == replaced
    assert told["software"]["quantlab"] == VERSION
    assert told["software"]["torch"] == torch.__version__
    assert "CUDA" in told["GPU"]
    assert torch.cuda.is_available() == ("cuda:0" in told["GPU"])
    assert "no such file" in told["engines"]["vllm"]
    assert told["caches and disk"]["Hugging Face hub"].endswith("logged in")
    assert "hf_secret_token" not in done.output


def test_its_tables_have_everything_that_json_has() -> None:
    told = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    shown = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"}).output
    for title, section in told.items():
        assert title in shown
        assert all(name in shown for name in section)
