"""The format `onnx`: integers as onnxruntime's MatMulNBits reads them, what is refused, and the writer around a program that plays
optimum-onnx. `test_onnxruntime.py` writes real graphs and runs them."""

import dataclasses
import json
import stat
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from quantlab.checkpoint.index import open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.cli import app
from quantlab.engine_pythons import MARK, engines_directory, variable_of
from quantlab.errors import ArtifactError, PlanError
from quantlab.evaluation.engines.engine import ENGINES
from quantlab.exports.export import export
from quantlab.exports.onnx import TARGET, block_of
from quantlab.exports.scripts.onnx_graph import restate_rope
from quantlab.exports.writers.onnx import ENGINE, n_bits
from quantlab.formats.read_contents import contents_of
from quantlab.formats.stored import StoredWeights
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.plan.compile import compile_plan
from quantlab.recipe.load import load_recipe
from tests.exports.artifacts import make_artifact

GRAPH = """
import json, shutil, sys
from pathlib import Path
plain, integers, out = map(Path, sys.argv[2:5])
for name in ("model.onnx", "model.onnx_data"):
    (out / name).write_bytes(b"graph")
(out / "model.onnx_data").chmod(0o600)
(out / "tokenizer_config.json").write_text("of another version of the tokenizer")
shutil.copy(integers, {kept!r})
print("a line of a library")
print(json.dumps({{"onnx": "1.2"}}))
"""
"""Plays optimum-onnx, and keeps the integers that it is given."""
FAIL = """
import sys
print("Traceback", file=sys.stderr)
sys.exit("ValueError: no such model")
"""


@pytest.fixture(autouse=True)
def without_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and no variable of the engine."""
    monkeypatch.delenv(variable_of(ENGINE), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def play(program: str, python: Path) -> Path:
    """A Python that runs a program instead of the script it is given."""
    python.parent.mkdir(parents=True, exist_ok=True)
    script = python.with_name("program.py")
    script.write_text(program)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    python.chmod(0o755)
    return python


def multiplied(q: Tensor, scale: Tensor, zero: Tensor | None, bits: int, block: int) -> list[list[float]]:
    """The matrix of MatMulNBits, byte by byte as the operator's specification says."""
    rows, blocks, _ = q.shape

    def integer(row: list[int], index: int) -> int:
        return row[index] if bits == 8 else row[index // 2] >> 4 * (index % 2) & 15

    zeros = None if zero is None else zero.view(rows, -1).tolist()
    return [
        [
            (integer(q[row, column // block].tolist(), column % block)
            - (1 << (bits - 1) if zeros is None else integer(zeros[row], column // block)))
            * float(scale[row * blocks + column // block])
            for column in range(blocks * block)
        ]
        for row in range(rows)
    ]  # fmt: skip


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("groups", "block"), [(3, 32), (6, 16), (1, 32), (1, 96)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_blocks_are_the_integers(bits: int, groups: int, block: int, *, asymmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits + groups)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    q = torch.randint(low, high, (5, 96), generator=generator).to(torch.int8)
    scale = (torch.randn(5, groups, generator=generator) * 0.01).to(torch.bfloat16)
    zero = torch.randint(low, high, (5, groups), generator=generator).to(torch.int8) if asymmetric else None
    part = n_bits(QuantizedMatrix(q, scale, bits, zero), block=block)
    assert part.q.shape == (5, 96 // block, block * bits // 8)
    steps = q.double().view(5, groups, -1) - (0 if zero is None else zero.double()[:, :, None])
    found = torch.tensor(multiplied(part.q, part.scale, part.zero, bits, block), dtype=torch.float64)
    assert torch.equal(found, (steps * scale.double()[:, :, None]).view(5, 96))


@pytest.mark.parametrize(
    ("family", "passes", "reason"),
    [
        ("llama", "[{quantize: fp8_block}]", "MatMulNBits holds integers of 4 and 8 bits with scales by row"),
        ("deepseek_v2", "[{quantize: int8_weight}]", "routed experts: the exporter records the experts"),
    ],
)
def test_the_plan_refuses_what_it_cannot_express(
    family: str, passes: str, reason: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {checkpoints[family]}\nvariants:\n  a: {{passes: {passes}, format: onnx}}\n")
    with pytest.raises(PlanError, match="the format onnx cannot express the variant") as caught:
        compile_plan(load_recipe(recipe).recipe, open_checkpoint(checkpoints[family]))
    assert reason in (caught.value.found or "")


@pytest.mark.parametrize(("columns", "block"), [(256, 128), (4864, 128), (160, 32), (96, 32), (16, 16), (24, None)])
def test_one_scale_per_row_is_repeated_over_blocks_of_a_power_of_two(
    columns: int, block: int | None, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    artifact = make_artifact(checkpoints["llama"], "[{quantize: int8_weight}]", tmp_path)
    contents = contents_of(open_checkpoint(artifact))
    assert TARGET.refuses(contents) is None
    weight = dataclasses.replace(contents.quantized[0], shape=(128, columns))
    refused = TARGET.refuses(dataclasses.replace(contents, weights=(weight,)))
    if block is None:
        assert refused is not None
        assert "takes whole blocks of a power of two" in refused
    else:
        assert refused is None
        assert block_of(weight) == block


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, True),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, True),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, False),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": None}, False),
    ],
)
def test_rotary_frequencies_that_depend_on_the_length_are_refused(
    config: dict, refused: bool, checkpoints: dict[str, Path]
) -> None:
    contents = contents_of(open_checkpoint(checkpoints["llama"]))
    contents = dataclasses.replace(contents, config={**contents.config, **config})
    assert ("depend on the length of the text" in (TARGET.refuses(contents) or "")) == refused


def test_without_an_environment_nothing_is_done(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    artifact = make_artifact(checkpoints["llama"], "[{quantize: int4_g128}]", tmp_path)
    done: list[int] = []
    with pytest.raises(ArtifactError, match="in an environment of its own") as caught:
        export(artifact, "onnx", tmp_path / "exports" / "onnx", done.append)
    assert "quantlab engines install onnxruntime" in (caught.value.fix or "")
    assert done == []
    assert list((tmp_path / "exports").iterdir()) == []


def test_a_run_names_the_missing_environment_before_the_work(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    variant = "{passes: [{quantize: int4_g128}], format: onnx}"
    recipe.write_text(f"model: {checkpoints['llama']}\nvariants:\n  a: {variant}\n")
    result = CliRunner().invoke(app, ["run", str(recipe), "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, ArtifactError)
    assert "in an environment of its own" in result.exception.what
    assert not (tmp_path / "out").exists()


def test_a_named_python_must_be_one(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make_artifact(checkpoints["llama"], "[{quantize: int4_g128}]", tmp_path)
    monkeypatch.setenv(variable_of(ENGINE), str(tmp_path))
    with pytest.raises(ArtifactError, match="is not an executable file"):
        export(artifact, "onnx", tmp_path / "onnx", lambda _: None)


@pytest.mark.parametrize("passes", ["[{quantize: int4_g32_asym}]", "[{quantize: int8}]", "[{cast: float16}]"])
def test_the_writer_in_an_installed_environment(passes: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    artifact, kept = make_artifact(checkpoints["qwen2"], passes, tmp_path), tmp_path / "kept.safetensors"
    directory = engines_directory() / ENGINE
    play(GRAPH.format(kept=str(kept)), directory / "bin" / "python")
    (directory / MARK).write_text("{}")
    done: list[int] = []
    notes = export(artifact, "onnx", tmp_path / "onnx", done.append)
    stored = StoredWeights(Reader(open_checkpoint(artifact)))
    contents = contents_of(stored.reader.checkpoint)
    assert sum(done) == contents.elements
    found = load_file(kept)
    for weight in contents.quantized:
        matrix = stored.read(weight.name)
        assert isinstance(matrix, QuantizedMatrix)
        part = n_bits(matrix, block=block_of(weight))
        for name, tensor in (("q", part.q), ("scale", part.scale), ("zero", part.zero)):
            one = found.pop(f"{weight.module}.{name}", None)
            assert (one is None) if tensor is None else torch.equal(one, tensor)
    assert found == {}
    names = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert {"model.onnx", "model.onnx_data", "tokenizer_config.json", "export.json"} <= names
    assert not [name for name in names if name.startswith(".") or name.endswith(".safetensors")]
    carried = (tmp_path / "onnx" / "tokenizer_config.json").read_bytes()
    assert carried == (artifact / "tokenizer_config.json").read_bytes()
    assert stat.S_IMODE((tmp_path / "onnx" / "model.onnx_data").stat().st_mode) & stat.S_IRGRP
    assert any("21 linears" in note for note in notes) == ("int8}" in passes)
    assert json.loads((tmp_path / "onnx" / "export.json").read_text())["versions"]["onnx"] == "1.2"


def test_a_graph_that_cannot_be_recorded_leaves_nothing(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make_artifact(checkpoints["llama"], "[{quantize: int4_g128}]", tmp_path)
    monkeypatch.setenv(variable_of(ENGINE), str(play(FAIL, tmp_path / "engine" / "python")))
    with pytest.raises(ArtifactError, match="cannot record the graph") as caught:
        export(artifact, "onnx", tmp_path / "exports" / "onnx", lambda _: None)
    assert caught.value.found == "ValueError: no such model"
    assert list((tmp_path / "exports").iterdir()) == []


def test_the_environment_is_that_of_the_engine() -> None:
    engine = ENGINES["onnxruntime"]
    assert (engine.name, engine.stem, engine.module) == (ENGINE, ENGINE, ENGINE)
    assert TARGET.name in engine.formats
    assert "optimum-onnx==" in engine.requirements.read_text()


@pytest.mark.parametrize(
    ("config", "restated"),
    [
        ({"rope_theta": 5.0}, {"rope_theta": 5.0}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, {"rope_theta": 5.0}),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5.0, "factor": 8.0}},
            {"rope_theta": 5.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ),
    ],
)
def test_the_rotary_embedding_in_the_fields_of_transformers_4(config: dict, restated: dict, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    restate_rope(path)
    found = json.loads(path.read_text())
    assert {key: value for key, value in found.items() if key != "rope_parameters"} == restated
