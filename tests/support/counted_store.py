"""A mock of S3 that counts requests and bytes, by kind; in this process or one of its own."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

RANGE = re.compile(r"bytes=(\d+)-(\d+)")
COUNTS = "/counts-of-requests"


class Counted:
    """A WSGI application around moto's.

    Attributes:
        requests: By kind.
        sent: Bytes that requests brought.
        read: Bytes that answers brought.
        copied: Bytes that the store copied by itself.
        failing: Called with what a request asks for; a status, if it is to fail.
    """

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self.application = application
        self.failing: Callable[[str, str, dict[str, Any]], int | None] = lambda *_: None
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        self.requests: Counter[str] = Counter()
        self.sent = self.read = self.copied = 0
        self.begun = time.perf_counter()

    def as_json(self) -> dict[str, Any]:
        return {
            "requests": dict(self.requests),
            "sent": self.sent,
            "read": self.read,
            "copied": self.copied,
        }

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == COUNTS:
            text = json.dumps(self.as_json()).encode()
            self.reset()
            start("200 OK", [("Content-Length", str(len(text)))])
            return [text]
        kind, length = kind_of(environ), environ.get("HTTP_X_AMZ_DECODED_CONTENT_LENGTH")
        status = self.failing(kind, environ["PATH_INFO"], environ)
        with self.lock:
            self.requests[kind] += 1
            self.sent += int(length or environ.get("CONTENT_LENGTH") or 0)
        if status is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(f"{status} no", [("Content-Length", "0")])
            return [b""]
        source = RANGE.fullmatch(environ.get("HTTP_X_AMZ_COPY_SOURCE_RANGE", ""))
        if source is not None:
            with self.lock:
                self.copied += int(source[2]) - int(source[1]) + 1
        blocks = self.application(environ, start)
        return blocks if environ["REQUEST_METHOD"] == "HEAD" else self._read(blocks)

    def _read(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        for block in blocks:
            with self.lock:
                self.read += len(block)
            yield block


def kind_of(environ: dict[str, Any]) -> str:
    """What a request asks for."""
    method, query = environ["REQUEST_METHOD"], environ.get("QUERY_STRING", "")
    is_copy = "HTTP_X_AMZ_COPY_SOURCE" in environ
    if method == "PUT":
        what = "copy" if is_copy else "put"
        return f"{what} part" if "partNumber" in query else what
    if method == "POST":
        return "begin" if query.startswith("uploads") else "delete" if "delete" in query else "end"
    if method == "GET":
        return "list" if "list-type" in query or environ["PATH_INFO"].count("/") < 2 else "get"
    return {"DELETE": "abort" if "uploadId" in query else "delete"}.get(method, method.lower())


@contextmanager
def counted_store(port: int = 0) -> Iterator[tuple[str, Counted]]:
    """Serve it on this machine, and yield its address."""
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    counted = Counted(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", port, counted, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", counted
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    with counted_store() as (address, _):
        print(address, flush=True)
        sys.stdin.read()
