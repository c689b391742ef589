"""What can go wrong with the Hugging Face hub: what is tried again, and what the user is told."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

from quantlab.errors import CheckpointError

T = TypeVar("T")

ATTEMPTS: Final = 5
FIRST_WAIT: Final = 1.0
"""Seconds before the second attempt; they double with every further one."""
_LONGEST_WAIT: Final = 120.0
_PASSING: Final = frozenset({408, 425, 429})
"""Status codes below 500 that another attempt may not get."""


@dataclass(frozen=True)
class Explanation:
    """What an exception of the library means.

    Attributes:
        what: one sentence.
        fix: what to do about it.
        passing: whether another attempt may succeed.
        out_of_reach: whether the hub did not answer, or was not asked.
        wait: seconds that the hub asks to wait, None if it does not.
    """

    what: str
    fix: str
    passing: bool = False
    out_of_reach: bool = False
    wait: float | None = None


def retried(call: Callable[[], T], *, where: str, attempts: int = ATTEMPTS) -> T:
    """Call the library; what may pass is tried again, with growing pauses.

    Raises:
        CheckpointError: with the exception of the last attempt as its cause.
    """
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # of its HTTP client

    _without_bars()
    caught: tuple[type[Exception], ...] = (HTTPError, HFValidationError, OSError, RuntimeError, *_of_storage())
    wait = FIRST_WAIT
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except caught as error:
            told = explained(error)
            if attempt == attempts or not told.passing:
                raise CheckpointError(
                    told.what,
                    where=where,
                    found=_shown(error) + (f" ({attempt} attempts)" if attempt > 1 else ""),
                    fix=told.fix,
                ) from error
        time.sleep(min(wait if told.wait is None else max(told.wait, wait), _LONGEST_WAIT))
        wait *= 2
    raise AssertionError("the last attempt returns or raises")


def _of_storage() -> tuple[type[Exception], ...]:
    """What the library raises when its transfers with the storage (Xet) fail, beside RuntimeError; older versions have no type for it."""
    from huggingface_hub import errors

    found = getattr(errors, "XetDownloadError", None)
    return () if found is None else (found,)


def _without_bars() -> None:
    """Turn off the library's progress bars, which would be drawn over those of a run, unless the user asked for them."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()


def explained(error: BaseException | None) -> Explanation:
    """What an exception of huggingface_hub, or of the connection below it, means."""
    from huggingface_hub import constants, errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its HTTP client

    chain = list(_chain(error))
    site = constants.ENDPOINT
    for one in chain:
        match one:
            case errors.OfflineModeIsEnabled():
                return Explanation(
                    "the model is not in the hub's cache, and HF_HUB_OFFLINE is set",
                    "unset HF_HUB_OFFLINE for the first use of a model, or give the directory of a copy",
                    out_of_reach=True,
                )
            case errors.GatedRepoError():
                return Explanation(
                    "the model is gated: its owner asks for your agreement",
                    f"agree on its page below {site}, then log in with `hf auth login` or set HF_TOKEN",
                )
            case errors.RepositoryNotFoundError():
                return Explanation(
                    "the hub has no such model, or it is private",
                    f"correct the id (organisation/name, as on {site}; a directory is relative to the recipe); for a private model "
                    "log in with `hf auth login` or set HF_TOKEN",
                )
            case errors.RevisionNotFoundError():
                return Explanation(
                    "the model has no such revision", "write a branch, a tag or a commit of the model after the @"
                )
            case errors.FileMetadataError():
                return Explanation(
                    "the answer is not that of a Hugging Face hub",
                    f"check HF_ENDPOINT ({site}) and the proxy settings",
                )
            case errors.HFValidationError():
                return Explanation(
                    "this is not the id of a model", "write organisation/name, or the path of a directory"
                )
            case errors.HfHubHTTPError():
                return _of_status(one, site)
    if any(isinstance(one, (RuntimeError, *_of_storage())) for one in chain):
        return Explanation(
            "the storage of the hub fails",
            f"look whether {site} works, or set HF_HUB_DISABLE_XET=1; then run the same command again: what was transferred is kept",
            passing=True,
        )
    http = [one for one in chain if isinstance(one, HTTPError | ConnectionError | TimeoutError)]
    if http or any(isinstance(one, errors.LocalEntryNotFoundError) for one in chain):
        return Explanation(
            "the hub cannot be reached, and its cache does not have the model",
            f"check the connection to {site} (HF_ENDPOINT, HTTPS_PROXY), then run the same command again: what was "
            "downloaded is kept",
            passing=bool(http),
            out_of_reach=True,
        )
    return Explanation(
        "a file of the model cannot be written", "free space, or set HF_HOME to a folder on another disk"
    )


def _of_status(error: Exception, site: str) -> Explanation:
    """What an answer of the hub means that is none of the named errors."""
    response = getattr(error, "response", None)
    status = int(getattr(response, "status_code", 0))
    if status in {401, 403}:
        return Explanation(
            "the hub refuses access",
            "log in with a token that may read this model: `hf auth login` or HF_TOKEN",
        )
    if status in _PASSING:
        asked = str(response.headers.get("Retry-After", "")) if response is not None else ""
        return Explanation(
            "the hub refuses further requests for now",
            "wait some minutes, or log in (`hf auth login`): the limit is higher then; then run the same command again",
            passing=True,
            wait=float(asked) if asked.isdigit() else None,
        )
    return Explanation(
        "the hub answers with an error",
        f"look whether {site} works, then run the same command again: what was downloaded is kept",
        passing=status >= 500,
        out_of_reach=status >= 500,
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _shown(error: Exception) -> str:
    """The first line of an exception that says something, and its status if it has one."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0][:200] if lines else type(error).__name__
    return f"status {status}: {text}" if status and str(status) not in text else text
