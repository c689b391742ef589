"""A plan of the released size by hub id: 163 shards whose headers come by range requests."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fake_model_hub import Repo, environment, running
from tests.true_shapes import V3, write_headers

SECONDS, BYTES = 15, 60e6


@pytest.mark.slow
def test_a_plan_of_v3_takes_seconds_and_megabytes(tmp_path: Path) -> None:
    """The seconds are those of the processor, which do not depend on what else runs; the time on the clock is printed."""
    directory = write_headers(tmp_path / "v3", V3, shards=163, fp8=True)
    (directory / "tokenizer.json").write_bytes(b" " * 7_800_000)  # as large as the released one
    (tmp_path / "recipe.yaml").write_text(
        "model: org/v3\nvariants:\n  w4a16-experts: [{quantize: int4_g128, targets: [routed_experts]}]\n"
    )
    with running(tmp_path / "uploads") as hub:
        hub.repos["org/v3"] = Repo(directory)
        command = [sys.executable, "-m", "quantlab", "plan", str(tmp_path / "recipe.yaml")]
        variables = {**os.environ, **environment(hub, tmp_path)}
        started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{seconds:.1f} s of the processor, {time.monotonic() - started:.1f} s, {hub.sent / 1e6:.1f} MB")
        assert len(hub.asked("/cdn/", "GET")) == 163
        assert hub.sent <= BYTES
    assert "w4a16-experts" in done.stdout
    assert "163 files, 689 GB" in " ".join(done.stdout.split())
    assert seconds <= SECONDS
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
