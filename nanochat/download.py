"""
Files from the web, fetched so that a name on disk always stands for a whole file.

What arrives is kept beside the target as `.<name>.<version>.part`, which a later attempt continues, and takes the
target's name once size and checksum are right. The version (checksum or ETag) in the name keeps two states of a file on
the server from being spliced into one. A lock on the part lets several processes ask for the same file.

    fetch("https://example.org/words.txt", Path("words.txt"))
"""

import fcntl
import glob
import hashlib
import os
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urljoin, urlsplit

import requests
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from nanochat.common import UserError, fsync

T = TypeVar("T")

TIMEOUT = (10, 30)  # seconds to connect, and between two pieces of the answer; arbitrary
RETRIES = 5  # after the first attempt; with the waits below about half a minute in all; arbitrary
MAX_WAIT = 60  # seconds between two attempts, even if the server asks for more; arbitrary
MAX_REDIRECTS = 10  # arbitrary
CHUNK = 1 << 16  # bytes read at a time, and so what a broken connection loses at most; arbitrary
LOCK_POLL = 0.1  # seconds between two looks at a file that another process is fetching; arbitrary
PLAIN = {"Accept-Encoding": "identity"}  # a compressed answer would have neither the file's size nor its ranges


@dataclass(frozen=True)
class File:
    url: str
    path: Path
    sha256: str = ""  # hex; "" = whatever the server says, if it does


@dataclass(frozen=True)
class Remote:
    """A file as the server describes it."""

    size: int  # bytes
    etag: str  # a strong one, else ""
    sha256: str  # hex, else ""


class _Transient(Exception):
    """An attempt failed in a way that may not repeat itself."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait  # seconds the server asks for


def fetch(url: str, path: Path, sha256: str = "", backoff: float = 1.0) -> None:
    """As fetch_all, for one file."""
    fetch_all([(url, path)], workers=1, sha256={url: sha256}, backoff=backoff)


def fetch_all(
    files: Sequence[tuple[str, Path]],
    workers: int = 4,
    sha256: Mapping[str, str] | None = None,  # url → hex
    backoff: float = 1.0,  # seconds before the second attempt, doubled before each further one
) -> None:
    """
    Fetches (url, path) pairs, `workers` at a time. A path that exists is whole and left alone, so nothing is asked of
    the network when all do. UserError: offline, too little disk space for all (known before the first byte), or files
    missing in the end, each named with its reason; everything else has been fetched then.
    """
    wanted = {path: File(url, path, (sha256 or {}).get(url, "")) for url, path in files if not path.exists()}
    if not wanted:
        return
    missing = list(wanted.values())
    _require_connection(missing[0].url)

    def look(file: File, stop: threading.Event) -> Remote:
        return _retry(lambda: describe(file.url), backoff, stop)

    remotes, failures = _in_parallel(look, missing, workers)
    _require_space(remotes)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"{len(remotes)} files", total=sum(remote.size for remote in remotes.values()))
        arrived = dict.fromkeys(remotes, 0)  # bytes

        def transfer(file: File, stop: threading.Event) -> None:
            def report(position: int) -> None:
                progress.advance(bar, position - arrived[file])
                arrived[file] = position

            _retry(lambda: _transfer(file, report, stop), backoff, stop)

        failures |= _in_parallel(transfer, list(remotes), workers)[1]
    if failures:
        reasons = [f"{file.path.name} ({reason})" for file, reason in sorted(failures.items(), key=lambda x: x[0].path)]
        listed = ", ".join(reasons[:10]) + (f" and {len(reasons) - 10} more" if len(reasons) > 10 else "")
        raise UserError(
            f"{len(failures)} of {len(files)} files are missing in {missing[0].path.parent}: {listed}; "
            "run the same command again, what has arrived is kept"
        )


def describe(url: str) -> Remote:
    """
    Asks for a file's size, version and checksum. The hub answers with a redirect whose X-Linked-* headers speak of the
    file itself (https://huggingface.co/docs/hub/storage-backends), and whose goal need not answer HEAD.
    """
    linked = ""
    for _ in range(MAX_REDIRECTS):
        response = requests.head(url, headers=PLAIN, timeout=TIMEOUT)
        linked = response.headers.get("X-Linked-ETag", linked).strip('"')
        if not response.is_redirect or "X-Linked-Size" in response.headers:
            break
        url = urljoin(url, response.headers["Location"])
    else:
        raise UserError(f"more than {MAX_REDIRECTS} redirects")
    _check_status(response)
    size = response.headers.get("X-Linked-Size") or response.headers.get("Content-Length", "")
    if not size.isdecimal():
        raise UserError("the server does not tell the size of the file")
    etag = "" if response.is_redirect else response.headers.get("ETag", "")
    is_sha256 = re.fullmatch("[0-9a-f]{64}", linked)
    return Remote(int(size), etag if etag.startswith('"') else "", linked if is_sha256 else "")


def _transfer(file: File, report: Callable[[int], None], stop: threading.Event) -> None:
    """One attempt: continues the part that is there, checks it and gives it its name."""
    remote = describe(file.url)
    sha256 = file.sha256 or remote.sha256
    part = _part(file, remote)
    with _locked(part, stop) as out:
        if file.path.exists():  # another process was faster
            part.unlink(missing_ok=True)
            return report(remote.size)
        if _size(out) > remote.size or not (sha256 or remote.etag):
            out.truncate(0)
        if _size(out) < remote.size:
            _append(file.url, remote, out, report, stop)
        out.seek(0)
        if sha256 and _sha256(out) != sha256.lower():
            out.truncate(0)
            raise _Transient("the checksum is not the expected one")
        fsync(part)
        os.replace(part, file.path)
        fsync(file.path.parent)
        report(remote.size)
    for old_version in file.path.parent.glob(f".{glob.escape(file.path.name)}.*.part"):
        old_version.unlink(missing_ok=True)


def _append(url: str, remote: Remote, out: BinaryIO, report: Callable[[int], None], stop: threading.Event) -> None:
    """Appends to `out` what it lacks of the file, or all of it where the server does not send ranges."""
    done = _size(out)
    headers = dict(PLAIN)
    if done:
        headers |= {"Range": f"bytes={done}-"} | ({"If-Range": remote.etag} if remote.etag else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:
            out.truncate(0)
            raise _Transient("the server refuses to continue the file")
        _check_status(response)
        if remote.etag and response.headers.get("ETag", remote.etag) != remote.etag:
            raise _Transient("the file changed on the server")
        if response.status_code != 206:
            out.truncate(0)
            done = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            raise _Transient("the server sends another range than the one asked for")
        total = done + int(response.headers.get("Content-Length", remote.size - done))
        if total != remote.size:
            raise _Transient(f"the server announces {remote.size} bytes and sends {total}")
        for chunk in response.iter_content(CHUNK):
            if stop.is_set():
                raise CancelledError
            out.write(chunk)
            done += len(chunk)
            report(done)
        out.flush()
        if done != remote.size:
            raise _Transient(f"{done} of {remote.size} bytes arrived")


def _part(file: File, remote: Remote) -> Path:
    version = hashlib.sha256((file.sha256 or remote.sha256 or remote.etag).encode()).hexdigest()[:16]
    return file.path.with_name(f".{file.path.name}.{version}.part")


@contextmanager
def _locked(part: Path, stop: threading.Event) -> Iterator[BinaryIO]:
    """Opens the part for appending, alone: waits while another process has it; the lock ends with its process."""
    part.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with part.open("ab+") as out:
            try:
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = part.exists() and os.path.samestat(part.stat(), os.fstat(out.fileno()))
            except OSError:  # BlockingIOError: locked; FileNotFoundError: renamed under our feet
                mine = False
            if mine:
                yield out
                return
        if stop.wait(LOCK_POLL):
            raise CancelledError


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def _check_status(response: requests.Response) -> None:
    reason = f"HTTP {response.status_code} {response.reason}"
    if response.status_code in (408, 429) or response.status_code >= 500:
        after = response.headers.get("Retry-After", "")
        raise _Transient(reason, float(after) if after.isdecimal() else 0.0)
    if response.status_code >= 400:
        raise UserError(reason)


def _retry(action: Callable[[], T], backoff: float, stop: threading.Event) -> T:
    """Repeats an action that failed for now, after waits that double and are spread by half; else UserError."""
    for attempt in range(RETRIES + 1):
        try:
            return action()
        except (_Transient, requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as e:
            if attempt == RETRIES:
                raise UserError(_reason(e)) from e
            wait = max(backoff * 2**attempt * random.uniform(0.5, 1.5), e.wait if isinstance(e, _Transient) else 0.0)
            if stop.wait(min(wait, MAX_WAIT)):
                raise CancelledError from e
    raise AssertionError("the last attempt returns or raises")


def _reason(error: Exception) -> str:
    """One short line; those of requests are long and nested."""
    if isinstance(error, requests.Timeout):
        return "the server does not answer in time"
    if isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    return " ".join(str(error).split())


def _in_parallel(
    action: Callable[[File, threading.Event], T], files: Sequence[File], workers: int
) -> tuple[dict[File, T], dict[File, str]]:
    """action(file, stop) for each file: its results, and the reasons of those that failed. Ctrl-C stops all soon."""
    results, failures = {}, {}
    stop = threading.Event()
    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(action, file, stop): file for file in files}
        for future in as_completed(futures):
            try:
                results[futures[future]] = future.result()
            except (UserError, OSError) as error:  # requests' exceptions are OSErrors too
                failures[futures[future]] = _reason(error)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    return results, failures


def _require_connection(url: str) -> None:
    """Tells being offline from a server with troubles, at once instead of after all the attempts."""
    try:
        requests.head(url, headers=PLAIN, timeout=TIMEOUT)
    except requests.ConnectionError as error:
        host = urlsplit(url).netloc
        raise UserError(f"no connection to {host}, nothing was fetched: check the network and run again") from error
    except (requests.Timeout, ValueError):
        pass  # slow, or not a URL: the attempts that follow will tell


def _require_space(remotes: Mapping[File, Remote]) -> None:
    parts = [_part(file, remote) for file, remote in remotes.items()]
    needed = sum(remote.size for remote in remotes.values()) - sum(p.stat().st_size for p in parts if p.exists())
    for folder in {file.path.parent for file in remotes}:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise UserError(
                f"{folder} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} GB are needed: "
                "free some space or ask for less"
            )
