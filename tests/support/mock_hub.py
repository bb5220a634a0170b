"""A hub on this machine: the few addresses that ``huggingface_hub`` asks, and its bad days."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

BLOCK = 1 << 20
API = re.compile(
    r"/api/models/(?P<repo>[^/]+(?:/[^/]+)?)(?:/(?P<what>revision|tree)/(?P<rest>.+))?"
)
RESOLVE = re.compile(r"/(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Repo:
    """A model of the mock: a folder on the disk."""

    folder: Path
    commit: str = "a" * 40
    revisions: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False
    token: str | None = None

    def commit_of(self, revision: str) -> str | None:
        known = {"main": self.commit, **self.revisions}
        return revision if revision in known.values() else known.get(revision)


@dataclass
class MockHub:
    """What the server serves, how it misbehaves, and what it was asked.

    Attributes:
        busy: Statuses that the next requests for files are answered with instead.
        cut: How many of the next answers with data end half way.
        pause: Seconds before every megabyte.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    address: str = ""
    takes_ranges: bool = True
    busy: list[int] = field(default_factory=list)
    cut: int = 0
    pause: float = 0.0
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    sent: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, folder: Path, **more) -> Repo:
        self.repos[name] = Repo(folder, **more)
        return self.repos[name]

    def forget_requests(self) -> None:
        self.asked.clear()
        self.sent = 0

    @property
    def methods(self) -> list[str]:
        return [method for method, _, _ in self.asked]


@contextmanager
def mock_hub() -> Iterator[MockHub]:
    """Serve a hub on a port of its own."""
    hub = MockHub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: MockHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(is_head=False)

    def do_HEAD(self) -> None:
        self._answer(is_head=True)

    def _answer(self, *, is_head: bool) -> None:
        hub, address = self.state, urlsplit(self.path)
        path = unquote(address.path)
        with hub.lock:
            hub.asked.append((self.command, path, self.headers.get("Range", "")))
            busy = hub.busy.pop(0) if hub.busy and not path.startswith("/data/") else None
        if busy is not None:
            self._send(busy, b"", {"Retry-After": "0"}, is_head=is_head)
        elif path.startswith("/data/"):
            _, _, name, inside = path.split("/", 3)
            self._file(hub.repos[unquote(name).replace("--", "/")], inside, is_head=is_head)
        elif (match := RESOLVE.fullmatch(path)) is not None:
            self._resolve(match, is_head=is_head)
        elif (match := API.fullmatch(path)) is not None:
            self._api(match, is_head=is_head)
        else:
            self._refuse(404, "EntryNotFound", is_head=is_head)

    def _known(self, name: str, *, is_head: bool) -> Repo | None:
        repo = self.state.repos.get(name)
        given = self.headers.get("Authorization")
        if repo is None:
            self._refuse(401, "RepoNotFound", is_head=is_head)
        elif given == "Bearer wrong":
            said = "Invalid credentials in Authorization header"
            self._refuse(401, "", is_head=is_head, said=said)
        elif repo.token is not None and given != f"Bearer {repo.token}":
            kind = "GatedRepo" if repo.is_gated else "RepoNotFound"
            self._refuse(403 if repo.is_gated and given else 401, kind, is_head=is_head)
        else:
            return repo
        return None

    def _commit(self, repo: Repo, revision: str, *, is_head: bool) -> str | None:
        commit = repo.commit_of(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", is_head=is_head)
        return commit

    def _api(self, match: re.Match[str], *, is_head: bool) -> None:
        repo = self._known(match["repo"], is_head=is_head)
        rest = match["rest"] or "main"
        revision = rest.partition("/")[0] if match["what"] == "tree" else rest
        commit = self._commit(repo, revision, is_head=is_head) if repo is not None else None
        if repo is None or commit is None:
            return
        files = sorted(path for path in repo.folder.rglob("*") if path.is_file())
        listed = [(path.relative_to(repo.folder).as_posix(), path.stat().st_size) for path in files]
        if match["what"] == "tree":
            said = [
                {"type": "file", "path": name, "size": size, "oid": _etag(name)}
                for name, size in listed
            ]
        else:
            siblings = [
                {"rfilename": name, "size": size, "blobId": _etag(name)} for name, size in listed
            ]
            model = {"id": match["repo"], "sha": commit, "private": False, "tags": []}
            said = {**model, "siblings": siblings}
        text = json.dumps(said).encode()
        self._send(200, text, {"Content-Type": "application/json"}, is_head=is_head)

    def _resolve(self, match: re.Match[str], *, is_head: bool) -> None:
        repo, path = self._known(match["repo"], is_head=is_head), match["path"]
        revision = match["revision"]
        commit = self._commit(repo, revision, is_head=is_head) if repo is not None else None
        if repo is None or commit is None:
            return
        if not (repo.folder / path).is_file():
            self._refuse(404, "EntryNotFound", is_head=is_head, commit=commit)
        elif not path.endswith((".safetensors", ".bin", ".gguf")):
            self._file(repo, path, is_head=is_head, commit=commit)
        else:
            # Weights lie elsewhere, as on the hub, where no token goes.
            target = self.state.address.replace("127.0.0.1", "localhost")
            headers = {
                "Location": f"{target}/data/{match['repo'].replace('/', '--')}/{path}",
                "X-Repo-Commit": commit,
                "X-Linked-Size": str((repo.folder / path).stat().st_size),
                "X-Linked-Etag": f'"{_etag(path)}"',
            }
            self._send(302, b"", headers, is_head=is_head)

    def _file(self, repo: Repo, inside: str, *, is_head: bool, commit: str | None = None) -> None:
        if self.path.startswith("/data/") and self.headers.get("Authorization"):
            self._refuse(400, "TokenSentElsewhere", is_head=is_head)
            return
        path = repo.folder / inside
        if not path.is_file():
            self._refuse(404, "EntryNotFound", is_head=is_head)
            return
        size = path.stat().st_size
        start, stop, status = 0, size, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"ETag": f'"{_etag(inside)}"'}
        if commit:
            headers["X-Repo-Commit"] = commit
        if asked is not None and self.state.takes_ranges:
            start, status = int(asked[1]), 206
            stop = min(size, int(asked[2]) + 1) if asked[2] else size
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._send(status, (path, start, stop), headers, is_head=is_head)

    def _refuse(
        self, status: int, code: str, *, is_head: bool, said: str = "", commit: str = ""
    ) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": said or code}
        if commit:
            headers["X-Repo-Commit"] = commit
        self._send(status, b"{}", headers, is_head=is_head)

    def _send(self, status: int, body, headers: dict[str, str], *, is_head: bool) -> None:
        size = len(body) if isinstance(body, bytes) else body[2] - body[1]
        self.send_response(status)
        for name, value in {"Content-Length": str(size), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if is_head:
            return
        with self.state.lock:
            is_cut = not isinstance(body, bytes) and self.state.cut > 0
            self.state.cut -= is_cut
        try:
            for block in _blocks(body, size // 2 if is_cut else size):
                time.sleep(self.state.pause)
                self.wfile.write(block)
                with self.state.lock:
                    self.state.sent += len(block)
        except OSError:  # whoever asked has gone
            is_cut = True
        if is_cut:
            self.close_connection = True


def _blocks(body, size: int) -> Iterator[bytes]:
    if isinstance(body, bytes):
        yield body[:size]
        return
    path, start, _ = body
    with path.open("rb") as file:
        file.seek(start)
        while size:
            block = file.read(min(BLOCK, size))
            yield block
            size -= len(block)


def _etag(name: str) -> str:
    return hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
