"""
Serves the page of the report on this machine while a run trains: / is the page, /data.json its data, read again for
each request.

Only programs of this machine reach it: it listens on the loopback address, and it rejects requests whose Host header
names another one, so that a web page cannot read it through a name that resolves to 127.0.0.1 (DNS rebinding).
"""

import hashlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from nanochat.common import UserError
from nanochat.report.files import data_of, page, to_json

HOST = "127.0.0.1"
NAMES = {HOST, "localhost"}


class ReportServer(ThreadingHTTPServer):
    """A server for one set of runs."""

    daemon_threads = True

    def __init__(self, port: int, read_runs: Callable[[], list[dict[str, Any]]]):
        """port: 0 = any free one. read_runs: called for each request. OSError if the port is in use."""
        self.read_runs = read_runs
        super().__init__((HOST, port), Handler)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    """Answers GET requests for the page and for its data."""

    server: ReportServer

    def do_GET(self) -> None:
        name = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
        if name not in NAMES:
            self.reply(403, "text/plain", f"open {self.server.url}")
        elif self.path == "/":
            self.reply(200, "text/html", page(None))
        elif self.path == "/data.json":
            self.send_data()
        else:
            self.reply(404, "text/plain", f"there is only {self.server.url}")

    def send_data(self) -> None:
        """The data, or 304 if the browser has the same already."""
        try:
            data = data_of(self.server.read_runs())
        except (UserError, OSError) as error:  # such as a folder that has no runs yet
            self.reply(503, "text/plain", str(error))
            return
        text = to_json(data)
        tag = f'"{hashlib.sha256(to_json(without_time(data)).encode()).hexdigest()[:32]}"'
        if self.headers.get("If-None-Match") == tag:
            self.reply(304, "application/json", "", tag)
        else:
            self.reply(200, "application/json", text, tag)

    def reply(self, status: int, kind: str, text: str, tag: str = "") -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests come every two seconds: they are not logged."""


def without_time(data: dict[str, Any]) -> dict[str, Any]:
    """The data without the time at which they were read."""
    return data | {"runs": [{name: value for name, value in run.items() if name != "written"} for run in data["runs"]]}
