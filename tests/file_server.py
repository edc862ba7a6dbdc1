"""A local web server with injectable faults that answers as the Hugging Face Hub does, for tests that download."""

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Fault:
    """What a response does wrong."""

    status: int = 0  # instead of the content
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes | None = None  # instead of the file's
    extra_length: int = 0  # added to the true Content-Length
    stall_at: int = -1  # after these bytes nothing is sent until `release`
    reset_at: int = -1  # after these bytes the connection is reset


class FileServer(ThreadingHTTPServer):
    """Serves `files`. Every response has an ETag and a commit, as huggingface_hub expects them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}  # path → content
        self.unavailable: dict[str, int] = {}  # "METHOD path" → number of requests still to be answered with 503
        self.break_at: dict[str, list[int]] = {}  # path → for each of the next GETs, bytes after which it breaks off
        self.faults: dict[str, list[Fault]] = {}  # "METHOD path" → for each of the next requests; None = no fault
        self.hold_at: dict[str, int] = {}  # path → bytes after which a GET waits for `release`
        self.release = threading.Event()
        self.log: list[tuple[str, str, str, int]] = []  # method, path, Range, status

    def add_dataset(self, repo: str, folder: Path) -> None:
        """Serves the files of a folder as a dataset of the hub, with the listings that `datasets` asks for."""
        info = {"id": repo, "sha": COMMIT, "siblings": []}
        self.files[f"/api/datasets/{repo}"] = json.dumps(info).encode()
        for revision in ("main", COMMIT):
            self.files[f"/api/datasets/{repo}/revision/{revision}"] = json.dumps(info).encode()
            for path in [folder, *folder.rglob("*")]:
                name = "" if path == folder else f"/{path.relative_to(folder).as_posix()}"
                if path.is_file():
                    self.files[f"/datasets/{repo}/resolve/{revision}{name}"] = path.read_bytes()
                else:
                    listing = [_tree_entry(folder, child) for child in path.iterdir()]
                    self.files[f"/api/datasets/{repo}/tree/{revision}{name}"] = json.dumps(listing).encode()

    def add_model(self, repo: str, folder: Path) -> None:
        """Serves the files of a folder as a model of the hub."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        names = [path.relative_to(folder).as_posix() for path in files]
        info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
        for revision in ("main", COMMIT):
            self.files[f"/api/models/{repo}/revision/{revision}"] = json.dumps(info).encode()
            self.files[f"/api/models/{repo}/tree/{revision}"] = json.dumps(
                [_tree_entry(folder, path) for path in files]
            ).encode()
            for name, path in zip(names, files, strict=True):
                self.files[f"/{repo}/resolve/{revision}/{name}"] = path.read_bytes()

    def gets(self, path: str) -> list[tuple[str, int]]:
        """(Range, status) of the GETs of a path so far."""
        return [(span, status) for method, name, span, status in self.log if (method, name) == ("GET", path)]


def _tree_entry(folder: Path, path: Path) -> dict[str, object]:
    content = path.read_bytes() if path.is_file() else b""
    return {
        "type": "file" if path.is_file() else "directory",
        "path": path.relative_to(folder).as_posix(),
        "oid": hashlib.sha1(content).hexdigest(),
        "size": len(content),
    }


class Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_HEAD(self) -> None:  # noqa: N802
        self.respond()

    def do_GET(self) -> None:  # noqa: N802
        self.respond()

    def respond(self) -> None:
        server = self.server
        path, _, _ = self.path.partition("?")
        request = f"{self.command} {path}"
        if server.unavailable.get(request, 0) > 0:
            server.unavailable[request] -= 1
            return self.start(503, 0, {})
        faults = server.faults.get(request)
        fault = faults.pop(0) if faults else Fault()
        if fault.status:
            return self.start(fault.status, 0, fault.headers)
        if path not in server.files:
            code = "RepoNotFound" if path.startswith("/api/") else "EntryNotFound"
            return self.start(404, 0, {"X-Error-Code": code})
        content = server.files[path]
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        if self.command == "HEAD":
            return self.start(200, len(content), headers)
        content = content if fault.content is None else fault.content
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if span:
            first = int(span[1])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            content = content[first:]
            self.start(206, len(content) + fault.extra_length, headers)
        else:
            self.start(200, len(content) + fault.extra_length, headers)
        if max(fault.stall_at, fault.reset_at) >= 0:
            return self.interrupt(content, fault)
        self.send_body(content)

    def interrupt(self, content: bytes, fault: Fault) -> None:
        """Sends the beginning of the content. Then it stalls, or resets the connection."""
        self.wfile.write(content[: max(fault.stall_at, fault.reset_at)])
        self.wfile.flush()
        self.close_connection = True
        if fault.stall_at >= 0:
            self.server.release.wait(60)
            return
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing sends RST
        self.connection.close()

    def send_body(self, content: bytes) -> None:
        server = self.server
        breaks = server.break_at.get(self.path)
        try:
            if self.path in server.hold_at:
                held = server.hold_at[self.path]
                self.wfile.write(content[:held])
                server.release.wait(60)
                content = content[held:]
            self.wfile.write(content[: breaks.pop(0)] if breaks else content)
        except OSError:
            pass  # the client disconnected

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
