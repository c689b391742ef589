"""The measuring process: `python -m quantlab.evaluation.processes.worker`.

Every cell runs in its own process, so that its memory peak is not affected by other cells and a crash costs one cell. Importing
torch and transformers takes several seconds, as long as measuring a small model. So one worker process imports them once and
forks a child per cell. The child inherits the imports, its writes are private (copy-on-write), and its memory peak starts at
the imports. The worker itself never computes, because threads of a pool do not survive a fork.

The protocol is JSON lines. Input: one `Job` per line. Output: {"event": "ready"}; then per job any number of
{"event": "progress", "stage": …, "done": …, "total": …} and, for tasks, {"event": "part", "answer": …}; finally
{"event": "exit", "status": …} with the child's exit code, which is negative for a signal. The worker ends when its input ends.
"""

import gc
import json
import os
import sys
from typing import TextIO, assert_never

import torch
import transformers
from pydantic import BaseModel

from quantlab.errors import QuantlabError
from quantlab.evaluation.memory.attention import measure_attention
from quantlab.evaluation.memory.measure import measure_memory
from quantlab.evaluation.processes.messages import (
    EXPLAINED,
    AttentionRequest,
    Job,
    MemoryRequest,
    Progress,
    QualityRequest,
    SendPart,
    ServedRequest,
    SpeedRequest,
    TasksRequest,
    TrialRequest,
)
from quantlab.evaluation.quality.measure import measure_quality
from quantlab.evaluation.served.measure import measure_served
from quantlab.evaluation.speed.measure import measure_speed
from quantlab.evaluation.tasks.measure import measure_tasks
from quantlab.evaluation.tasks.trial import try_tasks

# transformers imports a model's code at first access; accessed here, it is imported before the forks
_PRELOADED = ("AutoModelForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")


def main() -> None:
    """Serve jobs until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output printed by libraries must not mix with the answers
    for name in _PRELOADED:
        getattr(transformers, name)
    gc.freeze()  # garbage collections in the children skip the imported objects and so do not copy their pages
    _send(answers, event="ready")
    for line in sys.stdin:
        job = Job.model_validate_json(line)
        child = os.fork()
        if child == 0:
            # an exception ends the child with a traceback; otherwise os._exit skips the interpreter's shutdown of several seconds
            code = _run(job, answers)
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        _send(answers, event="exit", status=os.waitstatus_to_exitcode(status))


def _run(job: Job, answers: TextIO) -> int:
    """Measure one cell; returns the exit code of its process."""
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(job.threads)

    def progress(stage: str, done: int, total: int) -> None:
        _send(answers, event="progress", stage=stage, done=done, total=total)

    def send(part: BaseModel) -> None:
        _send(answers, event="part", answer=part.model_dump_json())

    try:
        answer = _measure(job, progress, send)
    except QuantlabError as error:
        job.result.write_text(str(error).replace("\n  ", "; "), encoding="utf-8")
        return EXPLAINED
    job.result.write_text(answer.model_dump_json(), encoding="utf-8")
    return 0


def _measure(job: Job, progress: Progress, send: SendPart) -> BaseModel:
    match job.request:
        case QualityRequest():
            return measure_quality(job.request, progress)
        case ServedRequest():
            return measure_served(job.request, progress)
        case TasksRequest():
            return measure_tasks(job.request, progress, send)
        case TrialRequest():
            return try_tasks(job.request, progress)
        case MemoryRequest():
            return measure_memory(job.request, progress)
        case SpeedRequest():
            return measure_speed(job.request, progress)
        case AttentionRequest():
            return measure_attention(job.request, progress)
        case _:
            assert_never(job.request)


def _send(answers: TextIO, **fields: object) -> None:
    answers.write(json.dumps(fields) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
