"""A run that is killed at any moment and restarted produces the same bytes as an uninterrupted one."""

import hashlib
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

WriteRecipe = Callable[..., Path]
VARIANTS = "  w4a16: [{quantize: int4_g128}]\n  fp16: [{cast: float16}]\n"

# Runs the command line in a process that kills itself at the N-th call of a function.
DRIVER = """
import os, signal, sys
import quantlab.files as files, quantlab.checkpoint.writer as writer, quantlab.run.artifact as artifact
import quantlab.run.directory as directory, quantlab.run.journal as journal
target, number = sys.argv[1], int(sys.argv[2])
calls = 0
def killing(owner, name):
    function = getattr(owner, name)
    def wrapper(*args, **kwargs):
        global calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    setattr(owner, name, wrapper)
match target:
    case "write": killing(writer.ShardWriter, "write")
    case "commit": killing(journal.Journal, "commit")
    case "finish": killing(artifact, "write_atomically")
    case "half a file": killing(files.os, "fsync")
    case "publish": killing(directory.RunDirectory, "publish")
    case "tidy": killing(directory.shutil, "rmtree")
sys.argv = ["quantlab", *sys.argv[3:]]
from quantlab.cli import main
main()
"""
# first tensor; inside a shard; between a shard and its line in the journal; before the config; before the manifest; with
# a half-written manifest; before the artifact is renamed; before the journal is removed. The second variant starts after
# the first is complete: tensor 200 and block 9 belong to it.
MOMENTS = [
    ("write", 1), ("write", 40), ("write", 250), ("commit", 3), ("commit", 9), ("finish", 1), ("finish", 6), ("half a file", 19),
    ("publish", 1), ("publish", 2), ("tidy", 1),
]  # fmt: skip


def command(recipe: Path, out: Path) -> list[str]:
    return ["run", str(recipe), "--out", str(out), "--quiet"]


def start(
    *arguments: str, driver: str = "from quantlab.cli import main; main()", prefix: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", driver, *prefix, *arguments], capture_output=True, text=True, check=False
    )


def hashes(out: Path) -> dict[str, str]:
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def recipe(checkpoints: dict[str, Path], write_recipe: WriteRecipe) -> Path:
    return write_recipe(checkpoints["deepseek_v3"], VARIANTS)


@pytest.fixture(scope="module")
def uninterrupted(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("whole")
    path = root / "recipe.yaml"
    path.write_text(f"model: {checkpoints['deepseek_v3']}\nvariants:\n{VARIANTS}")
    assert start(*command(path, root / "out")).returncode == 0
    return hashes(root / "out" / "artifacts")


@pytest.mark.slow
@pytest.mark.parametrize(("target", "number"), MOMENTS)
def test_killed_and_resumed_equals_uninterrupted(
    target: str, number: int, recipe: Path, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed = start(*command(recipe, out), driver=DRIVER, prefix=(target, str(number)))
    assert killed.returncode == -signal.SIGKILL
    assert hashes(out / "artifacts") != uninterrupted
    for name in ("w4a16", "fp16"):
        artifact = out / "artifacts" / name
        assert not artifact.exists() or (artifact / "manifest.json").is_file()
    again = start(*command(recipe, out))
    assert again.returncode == 0, again.stderr
    assert hashes(out / "artifacts") == uninterrupted
    assert not (out / ".work").exists()


@pytest.mark.slow
def test_finished_blocks_are_not_made_again(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    start(*command(recipe, out), driver=DRIVER, prefix=("commit", "4"))
    work = out / ".work" / "variants" / "w4a16"
    before = {path.name: path.stat().st_mtime_ns for path in (work / "shards").glob("*.safetensors")}
    lines = (work / "journal.jsonl").read_text().splitlines()
    assert len(lines) == 4
    finished = [file["name"] for line in lines[1:] for file in json.loads(line)["files"]]
    assert start(*command(recipe, out)).returncode == 0
    after = {path.name: path.stat().st_mtime_ns for path in (out / "artifacts" / "w4a16").glob("*.safetensors")}
    assert [after[name] == before[name] for name in finished] == [True] * 3


@pytest.mark.slow
def test_a_torn_journal_line_is_cut_off(recipe: Path, uninterrupted: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    start(*command(recipe, out), driver=DRIVER, prefix=("commit", "3"))
    journal = out / ".work" / "variants" / "w4a16" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    assert start(*command(recipe, out)).returncode == 0
    assert hashes(out / "artifacts") == uninterrupted


@pytest.mark.slow
def test_a_second_run_makes_nothing(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    start(*command(recipe, out))
    before = {path: path.stat().st_mtime_ns for path in (out / "artifacts").rglob("*")}
    assert start(*command(recipe, out)).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "artifacts").rglob("*")} == before


@pytest.mark.slow
def test_artifacts_of_another_recipe_are_refused_and_can_be_replaced(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    start(*command(recipe, out))
    recipe.write_text(recipe.read_text().replace("int4_g128", "int4_g64"))
    before = hashes(out)
    refused = start(*command(recipe, out))
    assert refused.returncode == 1
    assert "the output directory contains an artifact of another recipe" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert hashes(out) == before
    assert start(*command(recipe, out), "--overwrite").returncode == 0
    assert hashes(out / "artifacts" / "fp16") == {
        k.removeprefix("artifacts/fp16/"): v for k, v in before.items() if k.startswith("artifacts/fp16/")
    }
    assert hashes(out / "artifacts" / "w4a16") != hashes(out / "artifacts" / "fp16")


@pytest.mark.slow
def test_a_failed_overwrite_leaves_the_old_artifact(recipe: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    out = tmp_path / "out"
    start(*command(recipe, out))
    before = hashes(out / "artifacts")
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints["deepseek_v3"], broken)
    last = sorted(broken.glob("*.safetensors"))[-1]
    tensors = load_file(last)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.element_size() == 2)
    tensors[name][0] = float("nan")
    save_file(tensors, last)
    recipe.write_text(
        recipe.read_text().replace(str(checkpoints["deepseek_v3"]), str(broken)).replace("int4_g128", "int4_g64")
    )
    failed = start(*command(recipe, out), "--overwrite")
    assert failed.returncode == 1
    assert "a weight is not finite" in failed.stderr
    assert hashes(out / "artifacts") == before


@pytest.mark.slow
def test_an_artifact_that_lost_a_file_is_noticed_and_can_be_made_again(
    recipe: Path, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    start(*command(recipe, out))
    next((out / "artifacts" / "w4a16").glob("*.safetensors")).unlink()
    refused = start(*command(recipe, out))
    assert refused.returncode == 1
    assert "an incomplete artifact" in refused.stderr
    assert start(*command(recipe, out), "--overwrite").returncode == 0
    assert hashes(out / "artifacts") == uninterrupted


@pytest.mark.slow
def test_unfinished_work_of_another_recipe_is_refused(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    start(*command(recipe, out), driver=DRIVER, prefix=("commit", "3"))
    recipe.write_text(recipe.read_text().replace("int4_g128", "int4_g64"))
    refused = start(*command(recipe, out))
    assert refused.returncode == 1
    assert "unfinished work of another recipe" in refused.stderr
    assert start(*command(recipe, out), "--overwrite").returncode == 0


@pytest.mark.slow
def test_a_directory_that_is_no_artifact_is_refused(recipe: Path, tmp_path: Path) -> None:
    precious = tmp_path / "out" / "artifacts" / "w4a16" / "thesis.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    for extra in ([], ["--overwrite"]):
        refused = start(*command(recipe, tmp_path / "out"), *extra)
        assert refused.returncode == 1
        assert "something that quantlab did not make" in refused.stderr
    assert precious.read_text() == "years of work"


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_the_run_can_go_on(
    recipe: Path, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    done = subprocess.run(
        [sys.executable, "-c", "from quantlab.cli import main; main()", *command(recipe, out)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )
    assert done.returncode == 1
    assert "a file cannot be written" in done.stderr
    assert "free space" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(out.rglob("*.tmp"))
    assert not (out / "artifacts").exists()
    assert start(*command(recipe, out)).returncode == 0
    assert hashes(out / "artifacts") == uninterrupted


@pytest.mark.slow
def test_two_runs_at_once(recipe: Path, tmp_path: Path) -> None:
    import fcntl

    out = tmp_path / "out"
    (out / ".work").mkdir(parents=True)
    with (out / ".work" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = start(*command(recipe, out))
    assert refused.returncode == 1
    assert "another run is writing" in refused.stderr


@pytest.mark.slow
def test_weights_that_are_not_finite(checkpoints: dict[str, Path], write_recipe: WriteRecipe, tmp_path: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    for value in (float("nan"), float("inf")):
        broken = tmp_path / f"broken-{value}"
        shutil.copytree(checkpoints["llama"], broken)
        tensors = load_file(broken / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, broken / "model.safetensors")
        assert torch.isnan(tensors["model.layers.1.mlp.up_proj.weight"]).any() or value == float("inf")
        out = tmp_path / f"out-{value}"
        refused = start(*command(write_recipe(broken, VARIANTS), out))
        assert refused.returncode == 1
        assert "a weight is not finite" in refused.stderr
        assert "model.layers.1.mlp.up_proj.weight" in refused.stderr
        assert not (out / "artifacts").exists()


OVERFLOWS = [
    ("model.norm.weight", 1e5, "[{cast: float16}]", "overflows"),
    ("model.layers.0.mlp.up_proj.weight", 1e6, "[{cast: float16}, {prune: 0.08}]", "overflows"),
    ("model.layers.0.mlp.up_proj.weight", 1e8, "[{cast: float16}, {quantize: int8}]", "overflows"),
    ("model.layers.0.mlp.up_proj.weight", None, "[{cast: float16}, {quantize: int8}]", "underflows"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "value", "passes", "problem"), OVERFLOWS)
def test_values_that_the_dtype_cannot_represent(
    tensor: str,
    value: float | None,
    passes: str,
    problem: str,
    checkpoints: dict[str, Path],
    write_recipe: WriteRecipe,
    tmp_path: Path,
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    large = tmp_path / "large"
    shutil.copytree(checkpoints["llama"], large)
    tensors = load_file(large / "model.safetensors")
    if value is None:
        tensors[tensor] *= 1e-7
    else:
        tensors[tensor].view(-1)[0] = value
    save_file(tensors, large / "model.safetensors")
    refused = start(*command(write_recipe(large, f"  fp16: {passes}\n"), tmp_path / "out"))
    assert refused.returncode == 1
    assert f"a weight {problem} the dtype" in refused.stderr
    assert not (tmp_path / "out" / "artifacts").exists()
    assert "cast to bfloat16 instead" in refused.stderr


@pytest.mark.slow
def test_no_writable_directory(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = start(*command(recipe, tmp_path / "file" / "out"))
    assert refused.returncode == 1
    assert "the output directory cannot be created" in refused.stderr
