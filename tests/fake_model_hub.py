"""A hub on the loopback with the routes that huggingface_hub calls: reading with ranges and redirects, and writing with LFS.

Files with `.safetensors` are large files: their `resolve` redirects to another host name, as the hub redirects to its CDN.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "c0ffee" + "0" * 33 + "1"
_PIECE = 1 << 16


@dataclass
class Repo:
    """A repository: the files of a directory."""

    directory: Path
    commit: str = COMMIT
    gated: bool = False
    private: bool = False
    read_only: bool = False


@dataclass
class Fault:
    """What happens to requests of a pattern, a number of times: another status, or a connection cut after some bytes."""

    pattern: str
    times: int
    status: int = 503
    cut_after: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    host: str
    sent: int = 0


class Hub:
    """The state of the hub."""

    def __init__(self, uploads: Path) -> None:
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.token = "hf_good"
        self.uploads, self.blobs = uploads, uploads / "blobs"
        self.blobs.mkdir(parents=True)
        self.port = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def sent(self) -> int:
        """Bytes of all bodies."""
        return sum(request.sent for request in self.requests)

    def asked(self, pattern: str, method: str = "") -> list[Request]:
        return [one for one in self.requests if re.search(pattern, one.path) and one.method.startswith(method)]

    def fault(self, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        self.entry = Request(self.command, path, dict(self.headers), self.headers.get("Host", ""))
        hub.requests.append(self.entry)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.cut: int | None = None
        fault = hub.fault(path)
        if fault is not None and fault.cut_after is None:
            self._answer(fault.status, b"{}", fault.headers)
            return
        self.cut = None if fault is None else fault.cut_after
        for method, pattern, handle in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split():
                handle(self, **found.groupdict())
                return
        self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815 - names of http.server

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.entry.sent += len(body)

    def _json(self, content: object, status: int = 200) -> None:
        self._answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _repo(self, name: str, *, read: bool = True) -> Repo | None:
        """The repository, or None after an answer that says why not."""
        if name in self.hub.renamed:
            self._answer(307, headers={"Location": self.path.replace(name, self.hub.renamed[name], 1)})
            return None
        repo, known = self.hub.repos.get(name), self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repo is None or (repo.private and not known):
            self._answer(401 if not known else 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif read and repo.gated and not known:
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        else:
            return repo
        return None

    def model(self, repo: str, revision: str | None = None) -> None:
        found = self._repo(repo, read=False)
        if found is None:
            return
        if revision not in {None, "main", found.commit}:
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        names = [{"rfilename": path.relative_to(found.directory).as_posix()} for path in _files(found)]
        self._json(
            {"_id": "1", "id": repo, "sha": found.commit, "private": found.private, "siblings": names, "tags": []}
        )

    def tree(self, repo: str, revision: str) -> None:
        found = self._repo(repo, read=False)
        if found is not None:
            listed = []
            for path in _files(found):
                entry: dict[str, object] = {"type": "file", "path": path.relative_to(found.directory).as_posix()}
                entry |= {"size": path.stat().st_size, "oid": _etag(path)}
                if path.suffix == ".safetensors":
                    entry["lfs"] = {"oid": _etag(path), "size": path.stat().st_size, "pointerSize": 134}
                listed.append(entry)
            self._json(listed)

    def resolve(self, repo: str, revision: str, file: str) -> None:
        found = self._repo(repo)
        if found is None:
            return
        path = found.directory / file
        if not path.is_file():
            self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found.commit})
            return
        headers = {"X-Repo-Commit": found.commit, "ETag": f'"{_etag(path)}"', "Accept-Ranges": "bytes"}
        if path.suffix == ".safetensors":
            headers |= {"X-Linked-Size": str(path.stat().st_size), "X-Linked-Etag": f'"{_etag(path)}"'}
            self._answer(302, headers=headers | {"Location": f"http://localhost:{self.hub.port}/cdn/{repo}/{file}"})
        else:
            self._send(path, headers)

    def cdn(self, repo: str, file: str) -> None:
        self._send(self.hub.repos[repo].directory / file, {"Accept-Ranges": "bytes"})

    def _send(self, path: Path, headers: dict[str, str]) -> None:
        size = path.stat().st_size
        start, end, status = 0, size, 200
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found:
            start, end, status = int(found[1]), min(int(found[2]) + 1 if found[2] else size, size), 206
            headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{size}"}
        self.send_response(status)
        for name, value in {"Content-Length": str(end - start), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with path.open("rb") as file:
            file.seek(start)
            while start < end:
                if self.cut is not None and self.entry.sent >= self.cut:
                    self.close_connection = True
                    self.connection.close()
                    return
                data = file.read(min(_PIECE, end - start, self.cut or _PIECE))
                self.wfile.write(data)
                start += len(data)
                self.entry.sent += len(data)

    # ------------------------------------------------------------------------------------------------ writing

    def _may_write(self, name: str = "") -> bool:
        repo = self.hub.repos.get(name)
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._answer(401, b'{"error": "Invalid username or password."}')
            return False
        if repo is not None and repo.read_only:
            message = {"X-Error-Message": "you do not have the rights to write here"}
            self._answer(403, b'{"error": "you do not have the rights"}', message)
            return False
        return True

    def who(self) -> None:
        if self._may_write():
            self._json({"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}, "orgs": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
        if not self._may_write(name):
            return
        if name in self.hub.repos:
            self._json({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
            return
        directory = self.hub.uploads / name
        directory.mkdir(parents=True)
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.repos[name] = Repo(directory, private=private)
        self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def card(self) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, repo: str) -> None:
        if self._may_write(repo):
            asked = json.loads(self.body)["files"]
            modes = {True: "lfs", False: "regular"}
            files = [{"path": one["path"], "uploadMode": modes[one["path"].endswith(".safetensors")]} for one in asked]
            self._json({"files": [{**one, "shouldIgnore": False} for one in files]})

    def batch(self, repo: str) -> None:
        if not self._may_write(repo):
            return
        objects = []
        for one in json.loads(self.body)["objects"]:
            there = (self.hub.blobs / one["oid"]).is_file()
            actions = (
                {} if there else {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}", "header": {}}}}
            )
            objects.append({"oid": one["oid"], "size": one["size"], **actions})
        self._json({"transfer": "basic", "objects": objects})

    def blob(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        (self.hub.blobs / oid).write_bytes(self.body)
        self._answer(200)

    def commit(self, repo: str) -> None:
        import base64

        if not self._may_write(repo):
            return
        directory = self.hub.repos[repo].directory
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                path, data = directory / value["path"], base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                path, data = directory / value["path"], (self.hub.blobs / value["oid"]).read_bytes()
            else:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""})


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", _Handler.who),
    ("GET", rf"/api/models/{_REPO}", _Handler.model),
    ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>[^/]+)", _Handler.model),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("HEAD GET", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
    ("HEAD GET", rf"/cdn/{_REPO}/(?P<file>.+)", _Handler.cdn),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.card),
    ("POST", rf"/api/models/{_REPO}/preupload/main", _Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.blob),
    ("POST", rf"/api/models/{_REPO}/commit/main", _Handler.commit),
]


def _files(repo: Repo) -> list[Path]:
    return sorted(path for path in repo.directory.rglob("*") if path.is_file())


def _etag(path: Path) -> str:
    """A name of the content; of sparse gigabytes only size and name are hashed."""
    size = path.stat().st_size
    content = path.read_bytes() if size < 1 << 26 else b""
    return hashlib.sha256(content + f"{path.name}{size}".encode()).hexdigest()


@contextmanager
def running(uploads: Path) -> Iterator[Hub]:
    """A hub that answers on the loopback until the block ends."""
    hub = Hub(uploads)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.port = server.server_port
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def use(hub: Hub, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point this process's huggingface_hub, which reads its environment when it is imported, to a hub and an empty cache."""
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr("quantlab.checkpoint.hub_errors.FIRST_WAIT", 0.01)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    close_session()


def environment(hub: Hub, place: Path) -> dict[str, str]:
    """The variables of another process that uses a hub."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(place / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "XDG_CACHE_HOME": str(place / "cache"),
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "HF_TOKEN": "",
    }
