"""What went wrong with a dataset, as an error that says what to do.

The libraries behind a dataset (datasets, huggingface_hub, pyarrow, fsspec, the HTTP client) raise their own errors, often wrapped in each other.
They are told apart by the HTTP status in the chain of causes, and by the few types that have a remedy of their own.
"""

import re
import time
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

from quantlab.errors import QuantlabError

Result = TypeVar("Result")

WAITS: Final = [1.0, 3.0, 9.0]
"""Seconds before each new attempt of a request that may succeed later."""
_LATER = {408, 425, 429, 500, 502, 503, 504}
_BY_STATUS: Final = {
    401: ("the hub asks who you are", "log in with `hf auth login` or set HF_TOKEN; a wrong id is answered the same way"),
    403: ("the hub refuses access to the dataset", "ask for access on the dataset's page, then log in with `hf auth login` or set HF_TOKEN"),
    404: ("the hub has no such dataset", "correct the id or the revision, or give the path of a file or folder that exists"),
    429: ("the hub answers that there are too many requests", "wait some minutes and run the same command again, logged in if possible"),
}  # fmt: skip


def patiently(call: Callable[[], Result]) -> Result:
    """The result of a call, tried again after `WAITS` as long as the hub is busy or the connection breaks.

    Raises:
        Exception: the call's error, after the last attempt or if another attempt cannot help.
    """
    for seconds in WAITS:
        try:
            return call()
        except Exception as error:
            if not _may_succeed_later(error):
                raise
        time.sleep(seconds)
    return call()


def refusal(error: BaseException, kind: type[QuantlabError], *, where: str) -> QuantlabError:
    """The error to raise for an error of the libraries.

    Args:
        error: what a library raised.
        kind: the type of the result.
        where: the dataset, for the message.
    """
    found = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
    status = _status(error)
    text = " ".join(f"{type(one).__name__} {one}" for one in _chain(error))
    if "OfflineModeIsEnabled" in text or "offline mode" in text.lower():
        what, fix = (
            "the dataset is not on this machine, and the hub may not be asked",
            "unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE for one run, which keeps the samples in the run's directory, or name local files",
        )
    elif "Dataset scripts are no longer supported" in text or "trust_remote_code" in text:
        what, fix = (
            "the dataset is a program that would run on this machine, which quantlab refuses",
            "read data files in place of it: many such datasets have them under `revision: refs/convert/parquet`",
        )
    elif "gated dataset" in text:
        what, fix = _BY_STATUS[403]
    elif status in _BY_STATUS:
        what, fix = _BY_STATUS[status]
    elif status is not None and status >= 500:
        what, fix = "the hub cannot answer at the moment", "run the same command again later"
    elif "DatasetNotFoundError" in text and "Revision" in text:
        what, fix = "the dataset has no such revision", "correct `revision`, or leave it out for the main branch"
    elif "DatasetNotFoundError" in text or "RepositoryNotFound" in text:
        what, fix = _BY_STATUS[404]
    elif (names := re.search(r"among the available configs: (.*)|Available: (.*)", str(error))) is not None:
        what, fix = "the dataset has several configurations", f"write `config:` with one of {names[1] or names[2]}"
    elif "UnicodeDecodeError" in text or "UTF8" in text or "utf-8" in text:
        what, fix = "the dataset is not UTF-8 text", "convert the file to UTF-8"
    elif _is_connection(error):
        what, fix = "the hub cannot be reached", "check the network (proxy, HF_ENDPOINT) and run the same command again"
    elif isinstance(error, StopIteration):
        what, fix = "the dataset is empty", "give files with rows"
    elif "EmptyDatasetError" in text or "DataFilesNotFoundError" in text or "NoneType" in text:
        what, fix = (
            "no file that can be read was found",
            "give Parquet, JSON, JSON lines, CSV, text or Arrow files, compressed or not",
        )
    else:
        what, fix = "the dataset cannot be read", "correct the file; for a dataset of the hub try another `revision`"
    return kind(what, where=where, found=found, fix=fix)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error or one of its causes answers with."""
    for one in _chain(error):
        status = getattr(getattr(one, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _is_connection(error: BaseException) -> bool:
    """Whether a connection failed: the HTTP client's errors are no OSError, so its names count too."""
    names = {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}
    return not names.isdisjoint(
        {"ConnectionError", "TransportError", "TimeoutException", "TimeoutError", "ClientConnectionError"}
    )


def _may_succeed_later(error: BaseException) -> bool:
    status = _status(error)
    offline = any(type(one).__name__ == "OfflineModeIsEnabled" for one in _chain(error))
    return not offline and (status in _LATER if status is not None else _is_connection(error))
