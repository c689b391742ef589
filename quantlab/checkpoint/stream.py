"""Shards of a hub while a run reads them: fetched ahead in the order of their use, and deleted when room is needed.

A run reads the source block by block, and its plan says which files each block needs. So the next files can be fetched while a
block is computed, and the file whose next use is furthest away is deleted first (Belady's choice, IBM Systems Journal 1966, which
no other order beats). One thread fetches. A file is whole when it appears: the library writes it under another name and renames
it, and goes on with what an interrupted download left.
"""

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quantlab.errors import CheckpointError, QuantlabError

_NEVER: Final = 1 << 60


@dataclass(frozen=True)
class Store:
    """Where shards are kept.

    Attributes:
        fetch: fetches a file by name, and returns its path.
        held: the files that are there already.
        temporary: whether files are deleted when no later step uses them.
        budget: bytes that they may take in all; None for no limit.
    """

    fetch: Callable[[str], Path]
    held: dict[str, Path]
    temporary: bool
    budget: int | None = None


class ShardStream:
    """Gives shards to one reader, and fetches those that it will need.

    Args:
        uses: for every step of the run, in order, the files that it reads.
        sizes: bytes of every file.
        store: where they are kept.
    """

    def __init__(self, uses: Sequence[Collection[str]], sizes: dict[str, int], store: Store) -> None:
        self._uses, self._sizes, self._store = [frozenset(names) for names in uses], sizes, store
        self._held = dict(store.held)
        self._step = 0
        self._wanted: str | None = None
        self._problem: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._fetch_ahead, name="fetch shards", daemon=True)

    @staticmethod
    def least_budget(uses: Sequence[Collection[str]], sizes: dict[str, int]) -> int:
        """Bytes of the files that the largest step reads."""
        return max((sum(sizes[name] for name in set(names)) for names in uses), default=0)

    def reach(self, step: int) -> None:
        """Say which step the reader has come to: temporary files that neither it nor a later step uses are deleted."""
        with self._changed:
            self._step = step
            for name in [name for name in self._held if self._store.temporary and self._next_use(name) == _NEVER]:
                self._held.pop(name).unlink()
            self._changed.notify_all()

    def path(self, name: str) -> Path:
        """Where a file is, once it is there. It stays there until the next call.

        Raises:
            CheckpointError: it cannot be fetched.
        """
        with self._changed:
            self._wanted = name
            if self._thread.ident is None and not self._closed:
                self._thread.start()
            self._changed.notify_all()
            while name not in self._held:
                if self._problem is not None:
                    raise self._problem
                self._changed.wait()
            return self._held[name]

    def close(self, *, wait: bool = False) -> None:
        """Fetch nothing more.

        Args:
            wait: for the download that is under way; otherwise it ends with the process, and the next run goes on with it.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if wait and self._thread.ident is not None:
            self._thread.join()

    def _fetch_ahead(self) -> None:
        while True:
            with self._changed:
                while (name := self._next()) is None and not self._closed:
                    self._changed.wait()
                if self._closed or name is None:
                    return
            try:
                path = self._store.fetch(name)
            except (QuantlabError, OSError) as error:
                with self._changed:
                    self._problem = error if isinstance(error, QuantlabError) else _unwritten(name, error)
                    self._changed.notify_all()
                return
            with self._changed:
                self._held[name] = path
                self._changed.notify_all()

    def _next(self) -> str | None:
        """The file to fetch now, with room made for it; None if there is none, or no room."""
        if self._wanted is not None and self._wanted not in self._held:
            self._make_room(self._wanted, use=-1)
            return self._wanted
        for use, names in enumerate(self._uses[self._step :], start=self._step):
            for name in sorted(names - self._held.keys()):
                return name if self._make_room(name, use=use) else None
        return None

    def _make_room(self, name: str, *, use: int) -> bool:
        """Delete files with a later use than that of `name` until it fits; deletes nothing if it cannot fit. Whether it fits."""
        if self._store.budget is None:
            return True
        excess = sum(self._sizes[one] for one in self._held) + self._sizes[name] - self._store.budget
        victims = []
        for one in sorted(self._held.keys() - {self._wanted}, key=self._next_use, reverse=True):
            if excess <= 0 or self._next_use(one) <= use:
                break
            victims.append(one)
            excess -= self._sizes[one]
        if excess > 0:
            return False
        for one in victims:
            self._held.pop(one).unlink()
        return True

    def _next_use(self, name: str) -> int:
        """The next step that uses a file, from the step that the reader is at."""
        return next((step for step in range(self._step, len(self._uses)) if name in self._uses[step]), _NEVER)


def _unwritten(name: str, error: OSError) -> CheckpointError:
    return CheckpointError(
        "a shard of the hub cannot be kept",
        where=name,
        found=error.strerror or str(error),
        fix="free space, or choose another --out",
    )
