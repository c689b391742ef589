"""A model on the Hugging Face hub: opened from its small files and the headers of its shards, which are read by range requests.

Opening downloads no weights: the small files go into the hub's own cache, and the headers, a few megabytes, into quantlab's. Both
belong to one commit, which never changes, so a second opening needs one request, and none where the hub is out of reach or
`HF_HUB_OFFLINE` is set. Tokens, endpoints, proxies and the place of the cache are those of the library (`HF_TOKEN`, `HF_ENDPOINT`,
`HF_HOME`). Shards are fetched one by one when their tensors are read (`quantlab.checkpoint.stream` fetches them ahead).
"""

import base64
import json
import re
from collections.abc import Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from quantlab.checkpoint.header import PREFIX_BYTES, TensorEntry, header_length, parse_header, read_header
from quantlab.checkpoint.hub_errors import ATTEMPTS, explained, retried
from quantlab.checkpoint.index import INDEX_NAME, SINGLE_NAME, Checkpoint, open_checkpoint
from quantlab.checkpoint.stream import ShardStream
from quantlab.errors import CheckpointError
from quantlab.files import cache_directory, read_json, write_atomically

_SMALL: Final = [
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "*.tiktoken",
    "*.md",
    "*.yaml",
    "LICENSE*",
    "NOTICE*",
    "*POLICY*",
]
_FIRST_BYTES: Final = 1 << 17
"""Asked for first of every shard: most headers are shorter, and a second request fetches what is missing of a longer one."""
_AT_ONCE: Final = 16


@dataclass(frozen=True)
class HubModel:
    """A repository at one commit.

    Attributes:
        repo: its id.
        commit: sha of the commit.
    """

    repo: str
    commit: str

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit[:12]}"


class HubShards:
    """The safetensors files of a model on the hub.

    Args:
        model: the repository.
        directory: its snapshot in the hub's cache, with the small files.
        sizes: bytes of every safetensors file.
        begins: the first bytes of files, at least prefix and header.
    """

    def __init__(self, model: HubModel, directory: Path, sizes: dict[str, int], begins: dict[str, bytes]) -> None:
        self.model, self.sizes = model, sizes
        self._directory, self._begins = directory, begins
        self._stream: ShardStream | None = None
        self._steps: Mapping[Hashable, int] = {}

    @property
    def directory(self) -> Path:
        return self._directory

    @property
    def commit(self) -> str | None:
        return self.model.commit

    def names(self) -> frozenset[str]:
        return frozenset(self.sizes)

    def header(self, name: str) -> dict[str, TensorEntry]:
        return parse_header(self._directory / name, self._begins[name], size=self.sizes[name])

    def is_here(self, name: str) -> bool:
        return (self._directory / name).is_file()

    def path(self, name: str) -> Path:
        return self.fetch_to_cache(name) if self._stream is None else self._stream.path(name)

    def follow(self, stream: ShardStream, steps: Mapping[Hashable, int]) -> None:
        """Take files from a stream; `steps` numbers the steps that the reader will name."""
        self._stream, self._steps = stream, steps

    def reach(self, step: Hashable) -> None:
        """Tell the stream, if there is one, which step the reader has come to."""
        if self._stream is not None:
            self._stream.reach(self._steps[step])

    def unfollow(self) -> None:
        """Take files from the hub's cache again."""
        self._stream = None

    def fetch_to_cache(self, name: str) -> Path:
        """Fetch a file into the hub's cache, where it stays, unless it is there.

        Raises:
            CheckpointError: it cannot be fetched, or is not the one whose header was read.
        """
        return self._directory / name if self.is_here(name) else self.download(name)

    def download(self, name: str, into: Path | None = None) -> Path:
        """Download a file, or go on with a download that was interrupted.

        Args:
            name: of the file.
            into: a folder; by default the hub's cache.

        Raises:
            CheckpointError: it cannot be downloaded, or is not the one whose header was read.
        """
        from huggingface_hub import hf_hub_download

        fetch = partial(hf_hub_download, self.model.repo, name, revision=self.model.commit, local_dir=into)
        path = Path(retried(fetch, where=f"{self.model}, {name}"))
        if path.stat().st_size != self.sizes[name] or _entries(read_header(path)) != _entries(self.header(name)):
            found = f"{path.stat().st_size} bytes, {self.sizes[name]} were announced"
            path.resolve().unlink()  # in the hub's cache, the path is a link to it
            path.unlink(missing_ok=True)
            raise CheckpointError(
                "a shard is not the one whose header was read",
                where=f"{self.model}, {name}",
                found=found,
                fix="run the same command again; a proxy or mirror that answers with other files must be left out",
            )
        return path

    def fetch_all(self) -> None:
        """Fetch every file into the hub's cache.

        Raises:
            CheckpointError: as `fetch_to_cache`.
        """
        for name in sorted(self.sizes):
            self.fetch_to_cache(name)


def open_hub_model(repo: str, *, revision: str | None) -> Checkpoint:
    """Open a model of the hub: config, index, tokenizer and headers. No weights are downloaded.

    Raises:
        CheckpointError: the model cannot be reached, does not exist, is gated or was renamed, or cannot be read.
    """
    where = repo + (f"@{revision}" if revision else "")
    files = _listed(repo, revision, where)
    directory = _small_files(repo, revision, where)
    model = HubModel(repo, directory.name)
    sizes, begins = _begins(model, directory, files)
    return open_checkpoint(directory, HubShards(model, directory, sizes, begins))


def cached_snapshot(repo: str, commit: str) -> Path | None:
    """The directory of a commit in the hub's cache, which may hold some of its files; None without one."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    found = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "snapshots" / commit
    return found if found.is_dir() else None


def _listed(repo: str, revision: str | None, where: str) -> list[str] | None:
    """The files of a repository; None if the hub is out of reach.

    Raises:
        CheckpointError: the repository does not exist, was renamed, or is not for this user.
    """
    from huggingface_hub import HfApi

    attempts = 1 if _cached(repo).is_dir() else ATTEMPTS  # the cache answers at once where there is no connection
    try:
        info = retried(partial(HfApi().model_info, repo, revision=revision), where=where, attempts=attempts)
    except CheckpointError as error:
        if explained(error.__cause__).out_of_reach:
            return None
        raise
    if info.id != repo:
        raise CheckpointError(
            "the model has another name now", where=where, found=info.id, fix=f"write `model: {info.id}`"
        )
    return [file.rfilename for file in info.siblings or ()]


def _small_files(repo: str, revision: str | None, where: str) -> Path:
    """The snapshot in the hub's cache with everything but weights; its name is the commit."""
    from huggingface_hub import snapshot_download

    return Path(retried(partial(snapshot_download, repo, revision=revision, allow_patterns=_SMALL), where=where))


def _begins(model: HubModel, directory: Path, files: list[str] | None) -> tuple[dict[str, int], dict[str, bytes]]:
    """Sizes and first bytes of the files with the weights, from quantlab's cache or by range requests.

    Files that are already in the hub's cache are read there.
    """
    kept = _cached(model.repo) / f"{model.commit}.json"
    cached = read_json(kept) if kept.is_file() else {}
    sizes = dict(cached.get("sizes", {}))
    begins = {name: base64.b64decode(text) for name, text in cached.get("begins", {}).items()}
    wanted = _weights(directory, files if files is not None else [*sizes, *_local(directory)])
    missing = [name for name in wanted if name not in begins]
    for name in [name for name in missing if (directory / name).is_file()]:
        begins[name], sizes[name] = _local_begin(directory / name), (directory / name).stat().st_size
    missing = [name for name in missing if name not in begins]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for name, (begin, size) in zip(missing, pool.map(partial(_remote_begin, model), missing), strict=True):
            begins[name], sizes[name] = begin, size
    if missing:
        kept.parent.mkdir(parents=True, exist_ok=True)
        content = {"sizes": sizes, "begins": {name: base64.b64encode(one).decode() for name, one in begins.items()}}
        write_atomically(kept, json.dumps(content).encode())
    return {name: sizes[name] for name in wanted}, begins


def _cached(repo: str) -> Path:
    """The folder with the headers of a repository's commits."""
    return cache_directory() / "headers" / repo.replace("/", "--")


def _weights(directory: Path, files: Iterable[str]) -> list[str]:
    """The files whose headers are read: those of the index and a single file, or else all safetensors."""
    found = {name for name in files if name.endswith(".safetensors") and "/" not in name}
    if (directory / INDEX_NAME).is_file():
        weight_map = read_json(directory / INDEX_NAME).get("weight_map")
        named = (
            {name for name in weight_map.values() if isinstance(name, str)} if isinstance(weight_map, dict) else set()
        )
        found &= named | {SINGLE_NAME}
    return sorted(found)


def _local(directory: Path) -> list[str]:
    return [path.name for path in directory.glob("*.safetensors") if path.is_file()]


def _local_begin(path: Path) -> bytes:
    with path.open("rb") as file:
        begin = file.read(PREFIX_BYTES)
        return begin + file.read(header_length(path, begin, size=path.stat().st_size))


def _remote_begin(model: HubModel, name: str) -> tuple[bytes, int]:
    """Prefix and header of a file on the hub, and the file's size."""
    begin, size = _range(model, name, 0, _FIRST_BYTES)
    needed = PREFIX_BYTES + header_length(Path(str(model)) / name, begin, size=size)
    if len(begin) < min(needed, size):
        begin += _range(model, name, len(begin), needed)[0]
    return begin[:needed], size


def _range(model: HubModel, name: str, start: int, end: int) -> tuple[bytes, int]:
    """Bytes `start` to `end` of a file, or as many as there are, and the file's size.

    Raises:
        CheckpointError: the hub does not answer, or not with this range.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported, but not by the rules of the checker
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    def ask() -> tuple[bytes, int]:
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        url = hf_hub_url(model.repo, name, revision=model.commit)
        with http_stream_backoff(
            "GET", url, headers=headers, follow_redirects=True, timeout=30, max_retries=0
        ) as response:
            hf_raise_for_status(response)
            total = re.fullmatch(rf"bytes {start}-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if response.status_code != 206 or total is None:
                raise CheckpointError(
                    "the hub does not serve parts of files",
                    where=f"{model}, {name}",
                    found=f"status {response.status_code}, Content-Range {response.headers.get('Content-Range')!r}",
                    fix="use another HF_ENDPOINT or proxy, or download the model and give its directory",
                )
            found, size = b"".join(response.iter_bytes()), int(total[1])
        if len(found) != min(end, size) - start:
            raise ConnectionResetError(f"{len(found)} of {min(end, size) - start} bytes came")
        return found, size

    return retried(ask, where=f"{model}, {name}")


def _entries(header: dict[str, TensorEntry]) -> list[tuple[str, str, tuple[int, ...], int]]:
    """A header without the path of its file."""
    return [(entry.name, entry.dtype, entry.shape, entry.offset) for entry in header.values()]
