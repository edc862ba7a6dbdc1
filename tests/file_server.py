"""A web server with faults to order, for the tests of whatever fetches files."""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}  # path → content
        self.etags = True  # send ETag
        self.ranges = True  # heed Range
        self.unavailable: dict[str, int] = {}  # path → number of requests still to be answered 503
        self.break_at: dict[str, list[int]] = {}  # path → for each of the next GETs, bytes after which it breaks off
        self.hold_at: dict[str, int] = {}  # path → bytes after which a GET waits for `release`
        self.release = threading.Event()
        self.announce: dict[str, int] = {}  # path → Content-Length that HEAD claims
        self.redirect: dict[str, tuple[str, str]] = {}  # path → path it leads to, sha256 told on the way
        self.log: list[tuple[str, str, str, int]] = []  # method, path, Range, status

    def gets(self, path: str) -> list[tuple[str, int]]:
        """(Range, status) of the GETs so far."""
        return [(span, status) for method, name, span, status in self.log if (method, name) == ("GET", path)]


class Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_HEAD(self) -> None:  # noqa: N802
        self.answer()

    def do_GET(self) -> None:  # noqa: N802
        self.answer()

    def answer(self) -> None:
        server, path = self.server, self.path
        if server.unavailable.get(path, 0) > 0:
            server.unavailable[path] -= 1
            return self.start(503, 0, {"Retry-After": "0"})
        if path in server.redirect:
            target, sha256 = server.redirect[path]
            size = len(server.files[target])
            linked = {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(size)} if sha256 else {}
            return self.start(302, 0, {"Location": target} | linked)
        if path not in server.files:
            return self.start(404, 0, {})
        content = server.files[path]
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        headers = {"ETag": etag} if server.etags else {}
        if self.command == "HEAD":
            return self.start(200, server.announce.get(path, len(content)), headers)
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if span and server.ranges and self.headers.get("If-Range", etag) == etag:
            first = int(span[1])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self.start(206, len(content) - first, headers)
            content = content[first:]
        else:
            self.start(200, len(content), headers)
        if path in server.hold_at:
            held = server.hold_at[path]
            self.wfile.write(content[:held])
            server.release.wait(60)
            content = content[held:]
        breaks = server.break_at.get(path)
        try:
            self.wfile.write(content[: breaks.pop(0)] if breaks else content)
        except OSError:
            pass  # the client is gone

    def start(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.server.log.append((self.command, self.path, self.headers.get("Range", ""), status))
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(length)}).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def running() -> Iterator[FileServer]:
    server = FileServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        thread.join()
        server.server_close()
