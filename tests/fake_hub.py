"""A hub of datasets on the loopback address, for tests: what `datasets` and `huggingface_hub` ask of the real one.

    with FakeHub({"owner/name": {"data/train.parquet": b"…"}}) as hub: …

A dataset has one commit, whose name is a hash of its contents. The hub answers information, file lists and files (with ranges), and fails as it is told
to: `hub.fail("owner/name", status=429, times=2)`.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

Files = Mapping[str, bytes]


class FakeHub:
    """The hub, serving from `start` to `stop`.

    Args:
        datasets: the files of every dataset by its id.

    Attributes:
        requests: method and path of every request.
    """

    def __init__(self, datasets: Mapping[str, Files]) -> None:
        self.datasets = {name: dict(files) for name, files in datasets.items()}
        self.requests: list[str] = []
        self._failures: dict[str, list[tuple[int, str, str]]] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_POST = do_GET  # noqa: N815 - names of the library

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def commit(self, dataset: str) -> str:
        """The commit of a dataset, which follows from its files."""
        files = self.datasets[dataset]
        content = json.dumps({name: hashlib.sha1(data).hexdigest() for name, data in sorted(files.items())})
        return hashlib.sha1(content.encode()).hexdigest()

    def fail(self, dataset: str, *, status: int, times: int = 1000, code: str = "", path: str = "") -> None:
        """Answer the next requests for a dataset (and a part of a path) with an error, or break the connection if the status is 0."""
        self._failures[dataset] = [(status, code, path)] * times

    def start(self) -> "FakeHub":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        self.requests.append(f"{request.command} {request.path}")
        length = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(length).decode() if length else ""
        dataset = next(
            (name for name in sorted(self.datasets, key=len, reverse=True) if f"datasets/{name}" in path), None
        )
        failures = self._failures.get(dataset or "", [])
        if failures and failures[0][2] in path:
            status, code, _ = failures.pop(0)
            if status == 0:
                request.close_connection = True
                request.connection.close()
            else:
                self._send(request, status, b'{"error": "as told"}', {"X-Error-Code": code} if code else {})
        elif dataset is None:
            self._send(request, 404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif f"/api/datasets/{dataset}" in path:
            self._inform(request, dataset, path.partition(f"/api/datasets/{dataset}")[2], body)
        else:
            self._give(request, dataset, path)

    def _inform(self, request: BaseHTTPRequestHandler, dataset: str, rest: str, body: str) -> None:
        files, commit = self.datasets[dataset], self.commit(dataset)
        revision = re.match(r"/(revision|tree|paths-info)/([^/]+)", rest)
        if revision is not None and revision[2] not in {"main", commit}:
            self._send(request, 404, b'{"error": "Revision not found"}', {"X-Error-Code": "RevisionNotFound"})
        elif rest.startswith("/tree/"):
            under = rest.split("/", 3)[3] if rest.count("/") > 2 else ""
            self._json(
                request,
                [
                    *_folders(files, under),
                    *(_entry(name, data) for name, data in files.items() if name.startswith(under)),
                ],
            )
        elif rest.startswith("/paths-info/"):
            paths = json.loads(body)["paths"] if body.startswith("{") else re.findall(r"paths=([^&]*)", unquote(body))
            found = [_entry(name, files[name]) for name in paths if name in files]
            found += [one for name in paths for one in _folders(files, "") if one["path"] == name]
            self._json(request, found)
        elif rest in {"", "/"} or rest.startswith("/revision/"):
            siblings = [{"rfilename": name} for name in files]
            self._json(
                request,
                {
                    "id": dataset,
                    "sha": commit,
                    "private": False,
                    "gated": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "siblings": siblings,
                },
            )
        else:
            self._send(request, 404, b'{"error": "not in this hub"}', {})

    def _give(self, request: BaseHTTPRequestHandler, dataset: str, path: str) -> None:
        name = re.sub(r"^.*?/resolve/[^/]+/", "", path)
        data, commit = self.datasets[dataset].get(name), self.commit(dataset)
        headers = {
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
            "Content-Disposition": f'inline; filename="{name}"',
        }
        if "/resolve/main/" not in path and f"/resolve/{commit}/" not in path:
            self._send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif data is None:
            self._send(request, 404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        else:
            headers |= {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
            part = re.match(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
            if part is not None and request.command == "GET":
                start, end = int(part[1]), min(int(part[2] or len(data) - 1), len(data) - 1)
                headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
                self._send(request, 206, data[start : end + 1], headers)
            else:
                self._send(request, 200, data, headers)

    def _json(self, request: BaseHTTPRequestHandler, content: object) -> None:
        self._send(request, 200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, request: BaseHTTPRequestHandler, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)


def _entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


def _folders(files: Files, under: str) -> Iterator[dict[str, object]]:
    folders = {"/".join(name.split("/")[:depth]) for name in files for depth in range(1, name.count("/") + 1)}
    return iter(
        {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        for name in sorted(folders)
        if name.startswith(under) and name != under
    )


@contextmanager
def serving(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, cache: str) -> Iterator[FakeHub]:
    """Let `datasets` and `huggingface_hub` of this process ask the fake hub, with an empty cache."""
    import datasets.config
    from huggingface_hub import HfFileSystem, constants

    hub.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.address)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache + "/datasets")
    HfFileSystem.clear_instance_cache()
    try:
        yield hub
    finally:
        HfFileSystem.clear_instance_cache()
        hub.stop()
