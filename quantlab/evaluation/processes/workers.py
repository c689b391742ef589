"""Several workers that measure cells at the same time, where a device has room for several models.

A cell on a GPU spends most of its time outside the GPU: it starts CUDA, compiles kernels, launches small kernels from one thread.
So cells whose numbers do not depend on time run side by side. Timed cells still run alone.
"""

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from quantlab.errors import EvaluationError
from quantlab.evaluation.processes.messages import CellRequest, Progress
from quantlab.evaluation.processes.worker_client import Answer, CellError, Worker


class Workers:
    """A fixed number of workers; `run` is that of `Worker`, on the next idle one.

    It is a context manager: leaving it ends all workers and their running cells.
    """

    def __init__(self, directory: Path, *, count: int, threads: int, time_limit: float) -> None:
        """Start no process yet.

        Args:
            directory: output directory of the cells' results and logs.
            count: number of workers.
            threads: number of compute threads that cells share when they run side by side.
            time_limit: limit in seconds for a cell, and for each part of an answer.
        """
        self.count: Final = count
        each = max(1, threads // count)
        self._workers = [
            Worker(directory, threads=each, time_limit=time_limit, log=f"worker-{index}.log") for index in range(count)
        ]
        self._is_ended = False
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def __enter__(self) -> Self:
        for worker in self._workers:
            worker.__enter__()
        if len(self._workers) > 1:  # their imports overlap; a single worker starts with its first cell
            for worker in self._workers:
                worker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.__exit__(kind, error, trace)

    def run(
        self,
        name: str,
        request: CellRequest,
        answer: type[Answer],
        *,
        progress: Progress,
        part: Callable[[str], None] | None = None,
    ) -> Answer:
        """Run one cell, as `Worker.run`; waits until a worker is idle."""
        worker = self._idle.get()
        try:
            return worker.run(name, request, answer, progress=progress, part=part)
        except CellError:
            if self._is_ended:  # not a result of this cell: it must not reach a record
                raise EvaluationError("the evaluation was ended", where=name) from None
            raise
        finally:
            self._idle.put(worker)

    def side_by_side(self, calls: Sequence[Callable[[], object]]) -> None:
        """Make calls that run cells, as many at a time as there are workers.

        If one raises, or the user presses Ctrl-C, all running cells are ended and no further one starts.
        """
        if len(self._workers) == 1 or len(calls) == 1:
            for call in calls:
                call()
            return
        with ThreadPoolExecutor(len(self._workers)) as pool:
            futures = [pool.submit(call) for call in calls]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._is_ended = True
                for worker in self._workers:
                    worker.abandon()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
