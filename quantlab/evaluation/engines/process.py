"""Runs an engine's script in its own process and reads what it wrote, whatever happens to it.

Every way to fail has an outcome: a script that says so, an instruction that the processor lacks, memory and time are `not here`;
an error of the engine is `refuses`, with its last line; results that cannot be used are told from results that are wrong.
"""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file

from quantlab.engine_pythons import Environment, clean_environment
from quantlab.evaluation.engines.engine import CANNOT_RUN_HERE, Engine
from quantlab.evaluation.engines.verdict import EngineModules, Outcome

_KEPT_BYTES: Final = 1 << 16
"""Bytes of the end of a process's output that are kept."""
_LONGEST_LINE: Final = 500
_NOT_HERE: Final = "NOT HERE:"
_BROKEN_ENVIRONMENT: Final = ("ModuleNotFoundError", "ImportError")


class EngineReport(BaseModel):
    """The contents of result.json; further keys are ignored."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    version: str
    """Version of the engine."""
    versions: dict[str, str] = {}
    dtype: Literal["float32", "bfloat16", "float16"]
    """The dtype it computed in."""
    load_seconds: float | None = None
    modules: tuple[EngineModules, ...] = ()
    unquantized: tuple[str, ...] | None = None
    """Linears without a scheme, by the engine's names; None if the script does not say."""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()
    """Tensors that are not quantized and that the engine holds in fewer digits than the files."""
    peak_memory_bytes: int | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What a script is asked to compute.

    Attributes:
        model: directory or file of the model.
        dtype: "float32", "bfloat16" or "float16".
        threads: threads of the processor.
        documents: token ids of every text, at least two each.
        prompts: token ids that are continued greedily.
        greedy_tokens: tokens of a continuation.
        speed: tokens of the timed prefill and of the timed decode; None to time nothing.
        probes: inputs [T, K] of single linears by name.
    """

    model: Path
    dtype: str
    threads: int
    documents: tuple[tuple[int, ...], ...]
    prompts: tuple[tuple[int, ...], ...] = ()
    greedy_tokens: int = 0
    speed: tuple[int, int] | None = None
    probes: Mapping[str, NDArray[np.float32]] | None = None

    @property
    def tokens(self) -> int:
        """Log-probabilities that a result has."""
        return sum(len(document) - 1 for document in self.documents)


@dataclass(frozen=True)
class EngineResult:
    """What an engine computed.

    Attributes:
        report: about the engine and the model in it.
        nll: negative log-likelihood of every token, nats [N]; may hold NaN.
        top: most likely tokens [N].
        greedy: continuations [P, G], -1 after an end; None if none were asked for.
        probes: outputs of single linears [T, N] by name.
    """

    report: EngineReport
    nll: NDArray[np.float64]
    top: NDArray[np.int64]
    greedy: NDArray[np.int64] | None
    probes: Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class EngineFailure:
    """Why there is no result.

    Attributes:
        outcome: "refuses" or "not here".
        reason: in one line.
    """

    outcome: Outcome
    reason: str


def run_engine(
    engine: Engine, environment: Environment, wanted: Wanted, *, seconds: float
) -> EngineResult | EngineFailure:
    """Run an engine's script on one model.

    Args:
        engine: the engine.
        environment: the Python that runs it.
        wanted: the model and what is computed with it.
        seconds: time after which it is ended.
    """
    with tempfile.TemporaryDirectory(prefix="quantlab-engine-") as temporary:
        work = Path(temporary)
        # a copy under another name: beside a file `vllm.py`, `import vllm` would find that file
        script = work / "engine_script.py"
        shutil.copyfile(engine.script, script)
        for part in engine.parts:
            shutil.copyfile(part, work / part.name)
        results = work / "results"
        results.mkdir()
        (work / "request.json").write_text(json.dumps(_request(engine, wanted, work)), encoding="utf-8")
        command = [str(environment.python), str(script), str(work / "request.json"), str(results)]
        threads = {"OMP_NUM_THREADS": str(wanted.threads)}
        ended = _run(command, clean_environment({**threads, **engine.environment}), work, seconds=seconds)
        failure = _failure(ended, seconds)
        return failure if failure is not None else _read(results, wanted)


def _request(engine: Engine, wanted: Wanted, work: Path) -> dict[str, Any]:
    probes = None
    if wanted.probes:
        from safetensors.numpy import save_file

        probes = str(work / "probes.safetensors")
        save_file(dict(wanted.probes), probes)
    greedy = {"prompts": wanted.prompts, "tokens": wanted.greedy_tokens} if wanted.prompts else None
    speed = {"prefill": wanted.speed[0], "decode": wanted.speed[1]} if wanted.speed else None
    return {
        "model": str(wanted.model.absolute()),
        "dtype": wanted.dtype,
        "threads": wanted.threads,
        "documents": wanted.documents,
        "greedy": greedy,
        "speed": speed,
        "probes": probes,
        "options": dict(engine.options),
    }


@dataclass(frozen=True)
class _Ended:
    """How a process ended: its status (None if it was ended for time), and the ends of what it printed."""

    status: int | None
    output: str
    errors: str


def _run(command: Sequence[str], environment: Mapping[str, str], work: Path, *, seconds: float) -> _Ended:
    """Run a command in a process group of its own, which is ended with it."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(environment),
        cwd=work,
        start_new_session=True,
    )
    assert process.stdout is not None, "started with a pipe"
    assert process.stderr is not None, "started with a pipe"
    with _tail_of(process.stdout) as output, _tail_of(process.stderr) as errors:
        status: int | None = None
        with suppress(subprocess.TimeoutExpired), _ending_its_group(process):
            status = process.wait(timeout=seconds)
    return _Ended(status, bytes(output).decode(errors="replace"), bytes(errors).decode(errors="replace"))


@contextmanager
def _ending_its_group(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End a process and its children when the block is left, also by Ctrl-C."""
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it ended, and left no children
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _tail_of(pipe: IO[bytes]) -> Iterator[bytearray]:
    """Read a pipe to its end in a thread, keeping the last bytes: a process that prints without end fills no memory."""
    kept = bytearray()

    def read() -> None:
        while data := os.read(pipe.fileno(), 1 << 14):
            kept.extend(data)
            del kept[:-_KEPT_BYTES]

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield kept
    finally:
        thread.join(timeout=10)
        if not thread.is_alive():
            pipe.close()


def _failure(ended: _Ended, seconds: float) -> EngineFailure | None:
    """Why a process has no result; None if it ended well."""
    if ended.status == 0:
        return None
    if ended.status is None:
        return EngineFailure("not here", f"no result within {seconds:g} seconds")
    last = _last_line(ended.errors) or _last_line(ended.output)
    if ended.status == CANNOT_RUN_HERE:
        lines = [*ended.output.splitlines(), *ended.errors.splitlines()]
        told = [line.removeprefix(_NOT_HERE).strip() for line in lines if line.startswith(_NOT_HERE)]
        return EngineFailure("not here", told[-1] if told else last or "the script gives no reason")
    if ended.status == -signal.SIGILL:
        return EngineFailure("not here", "the engine uses instructions that this CPU lacks")
    if ended.status == -signal.SIGKILL:
        return EngineFailure("not here", "killed, probably for memory")
    if ended.status < 0:
        return EngineFailure("refuses", f"ended by {_signal(-ended.status)}" + (f": {last}" if last else ""))
    if last.startswith(_BROKEN_ENVIRONMENT):
        return EngineFailure("not here", f"the engine's environment is incomplete: {last}")
    return EngineFailure("refuses", last or f"exit code {ended.status}")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:_LONGEST_LINE] if lines else ""


def _read(results: Path, wanted: Wanted) -> EngineResult | EngineFailure:
    """The result files of a script, checked: shapes and kinds, but not whether numbers are right."""
    try:
        report = EngineReport.model_validate_json((results / "result.json").read_bytes())
        tensors: dict[str, NDArray[Any]] = load_file(results / "result.safetensors")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return _unusable(f"result.json, {'.'.join(map(str, first['loc']))}: {first['msg']}")
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        return _unusable(_last_line(str(error)) or type(error).__name__)
    shapes: dict[str, tuple[int, ...]] = {"nll": (wanted.tokens,), "top": (wanted.tokens,)}
    if wanted.prompts:
        shapes["greedy"] = (len(wanted.prompts), wanted.greedy_tokens)
    for name, shape in shapes.items():
        found = tensors.get(name)
        if found is None or found.shape != shape:
            return _unusable(f"{name} is {'missing' if found is None else list(found.shape)}, expected {list(shape)}")
    probes = {
        name.removeprefix("probe."): one.astype(np.float64)
        for name, one in tensors.items()
        if name.startswith("probe.")
    }
    for name, inputs in (wanted.probes or {}).items():
        if name in probes and (probes[name].ndim != 2 or len(probes[name]) != len(inputs)):
            return _unusable(f"probe.{name} is {list(probes[name].shape)}, expected {len(inputs)} rows")
    greedy = tensors["greedy"].astype(np.int64) if wanted.prompts else None
    return EngineResult(report, tensors["nll"].astype(np.float64), tensors["top"].astype(np.int64), greedy, probes)


def _unusable(problem: str) -> EngineFailure:
    return EngineFailure("refuses", f"no usable result: {problem}")
