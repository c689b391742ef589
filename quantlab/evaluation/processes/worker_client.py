"""Client of the worker process: sends cells to it, and handles time limits, crashes and Ctrl-C."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ValidationError

from quantlab.errors import EvaluationError
from quantlab.evaluation.processes.messages import EXPLAINED, CellRequest, Job, Progress
from quantlab.hardware import INSTRUCTION_VARIABLES

Answer = TypeVar("Answer", bound=BaseModel)

_STARTING_SECONDS = 300.0
_PASSED_ON = (
    "PATH", "HOME", "USER", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "XDG_CACHE_HOME",
    "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "TRITON_CACHE_DIR",
    "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ALLOW_CODE_EVAL",
)  # fmt: skip


class CellError(Exception):
    """A cell failed; the message is the reason."""


class Worker:
    """Handle of a worker process, which starts at the first job and restarts after it was stopped.

    It is a context manager: leaving it ends the process and its running cell.
    """

    def __init__(self, directory: Path, *, threads: int, time_limit: float, log: str = "worker.log") -> None:
        """Start no process yet.

        Args:
            directory: output directory of the cells' results and logs.
            threads: number of threads of a cell.
            time_limit: limit in seconds for a cell, and for each part of an answer.
            log: name of the worker's own log file.
        """
        self._directory, self._threads, self._time_limit = directory, threads, time_limit
        self._log = directory / log
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = self._is_abandoned = False
        self._pending = b""

    def __enter__(self) -> Self:
        self._directory.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def run(
        self,
        name: str,
        request: CellRequest,
        answer: type[Answer],
        *,
        progress: Progress,
        part: Callable[[str], None] | None = None,
    ) -> Answer:
        """Run one cell.

        Args:
            name: base name of its result and log files.
            request: the request.
            answer: pydantic model of the answer.
            progress: called with the cell's stages.
            part: receives each part of the answer as JSON; the time limit restarts with every part.

        Raises:
            CellError: the cell crashed, exceeded the time limit, failed with a known error, or sent an invalid answer.
            EvaluationError: the worker cannot be started.
        """
        process = self._started()
        result, log = self._directory / f"{name}.json", self._directory / f"{name}.log"
        result.unlink(missing_ok=True)
        log.unlink(missing_ok=True)
        job = Job(request=request, result=result, log=log, threads=self._threads)
        assert process.stdin is not None, "started with a pipe"
        try:
            process.stdin.write(job.model_dump_json().encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:  # the worker died after its last cell
            self._stop()
            raise CellError("the worker died" + _tail(self._log)) from None
        status = self._follow(log, progress, part)
        if status == EXPLAINED:
            raise CellError(result.read_text(encoding="utf-8"))
        if status != 0:
            raise CellError(_crash(status, log))
        try:
            return answer.model_validate_json(result.read_bytes())
        except OSError as error:
            raise CellError(f"its answer cannot be read: {error.strerror}") from error
        except ValidationError as error:
            raise CellError(invalid_answer(error)) from error

    def _follow(self, log: Path, progress: Progress, part: Callable[[str], None] | None) -> int:
        """Pass progress and parts on until the cell ends; its exit status."""
        deadline = time.monotonic() + self._time_limit
        while True:
            message = self._message(deadline)
            if message is None:
                self._stop()
                raise CellError(f"it took longer than the {self._time_limit:g} seconds a cell may take")
            match message["event"]:
                case "progress":
                    progress(message["stage"], message["done"], message["total"])
                case "part":
                    deadline = time.monotonic() + self._time_limit
                    if part is not None:
                        part(message["answer"])
                case "exit":
                    return int(message["status"])
                case "end":
                    self._stop()
                    raise CellError("the worker died" + _tail(log))

    def _message(self, deadline: float) -> Mapping[str, Any] | None:
        """The worker's next message; None after the deadline, {"event": "end"} if the worker has ended."""
        assert self._process is not None, "the worker was started"
        assert self._process.stdout is not None, "started with a pipe"
        while b"\n" not in self._pending:
            ready, _, _ = select.select([self._process.stdout], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                return None
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                return {"event": "end"}
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        message: Mapping[str, Any] = json.loads(line)
        return message

    def start(self) -> None:
        """Start the process unless it runs already, without waiting until it is ready."""
        if self._process is not None and self._process.poll() is None:
            return
        self._stop()
        with self._log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "quantlab.evaluation.processes.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_environment(),
                start_new_session=True,  # Ctrl-C reaches only this process, which then ends worker and cell with one signal
            )
        self._pending, self._is_ready = b"", False
        if self._is_abandoned:  # meanwhile
            self._kill()

    def abandon(self) -> None:
        """End the process and its cell, from another thread than that of `run`, whose cell fails. It does not start again."""
        self._is_abandoned = True
        self._kill()

    def _started(self) -> subprocess.Popen[bytes]:
        """The process, ready for a cell."""
        if self._is_abandoned:
            raise CellError("it was ended")
        self.start()
        assert self._process is not None, "it was started"
        if not self._is_ready:
            message = self._message(time.monotonic() + _STARTING_SECONDS)
            if message is None or message["event"] != "ready":
                self._stop()
                raise EvaluationError(
                    "the measuring process cannot be started",
                    where=str(self._log),
                    found=_tail(self._log).strip() or "no answer",
                    fix="run `python -m quantlab.evaluation.processes.worker < /dev/null` to see why",
                )
            self._is_ready = True
        return self._process

    def _stop(self) -> None:
        if self._process is None:
            return
        self._kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()
        self._process = None

    def _kill(self) -> None:
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):  # already gone
                os.killpg(process.pid, signal.SIGKILL)


def invalid_answer(error: ValidationError) -> str:
    """Describe an invalid answer. A number that is not finite, for example, has no JSON and arrives as null."""
    first = error.errors(include_url=False)[0]
    return f"its answer is invalid: {'.'.join(map(str, first['loc']))}: {first['msg']}"


def _environment() -> dict[str, str]:
    """A clean environment. Of the caller's variables, only those that select instructions affect numbers; records list them."""
    environment = {name: os.environ[name] for name in (*_PASSED_ON, *INSTRUCTION_VARIABLES) if name in os.environ}
    ours = str(Path(__file__).parents[3])
    paths = [ours, environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else [ours]
    return environment | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),  # task data is downloaded only on request
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        # a library's check for a GPU must not initialize CUDA in the worker: CUDA does not work in a process forked after that
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        # threads that spin while waiting take cores from working threads as soon as anything else runs on the machine;
        # a few microseconds of spinning bridge the gap between two operations
        "GOMP_SPINCOUNT": "5000",
    }


def _crash(status: int, log: Path) -> str:
    how = f"it was ended by {signal.Signals(-status).name}" if status < 0 else f"it ended with exit code {status}"
    hint = " (out of memory, perhaps)" if status == -signal.SIGKILL else ""
    return how + hint + _tail(log)


def _tail(log: Path, *, lines: int = 3) -> str:
    """The last printed lines of a log, after a colon; empty if there are none."""
    if not log.is_file():
        return ""
    printed = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return ": " + " | ".join(printed[-lines:]) if printed else ""
