"""
Downloads: whatever a server or a kill does, a name on disk stands for a whole file, and a failure says what is missing.

    python -m pytest tests/test_download.py
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import pytest
from file_server import running

from nanochat import download
from nanochat.common import UserError

ROOT = Path(__file__).resolve().parent.parent
CONTENT = random.Random(0).randbytes(300_000)  # a few chunks
OTHER = random.Random(1).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
fetch = partial(download.fetch, backoff=0.001)
fetch_all = partial(download.fetch_all, backoff=0.001)


@pytest.fixture
def server():
    with running() as server:
        server.files["/a"] = CONTENT
        yield server


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def break_once(server, target, at=200_000):
    """Leaves a part of the file behind."""
    server.break_at["/a"] = [at] * (download.RETRIES + 1)
    server.ranges = False  # so that each attempt starts anew and breaks off at the same place
    with pytest.raises(UserError, match="a"):
        fetch(f"{server.url}/a", target)
    server.break_at, server.ranges = {}, True
    server.log.clear()
    [part] = target.parent.iterdir()
    assert not target.exists() and 0 < part.stat().st_size <= at
    return part


def test_a_file_arrives_whole_and_leaves_nothing_else(server, tmp_path):
    fetch(f"{server.url}/a", tmp_path / "new" / "a")
    assert (tmp_path / "new" / "a").read_bytes() == CONTENT
    assert names(tmp_path / "new") == ["a"]


def test_a_file_that_is_there_needs_no_network(tmp_path):
    (tmp_path / "a").write_bytes(b"here")
    fetch("http://127.0.0.1:9/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"here"


def test_an_empty_file(server, tmp_path):
    server.files["/empty"] = b""
    fetch(f"{server.url}/empty", tmp_path / "empty")
    assert (tmp_path / "empty").read_bytes() == b""


def test_a_broken_connection_is_continued_where_it_broke(server, tmp_path):
    server.break_at["/a"] = [200_000]
    fetch(f"{server.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT
    first, second = server.gets("/a")
    assert first == ("", 200)
    assert second[0].startswith("bytes=") and second[0] != "bytes=0-" and second[1] == 206


def test_a_server_without_ranges_sends_it_all_again(server, tmp_path):
    server.break_at["/a"], server.ranges = [200_000], False
    fetch(f"{server.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert [status for _, status in server.gets("/a")] == [200, 200]


def test_without_a_version_nothing_is_continued(server, tmp_path):
    server.break_at["/a"], server.etags = [200_000], False
    fetch(f"{server.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert server.gets("/a") == [("", 200), ("", 200)]


def test_two_versions_are_never_spliced(server, tmp_path):
    break_once(server, tmp_path / "a")
    server.files["/a"] = OTHER
    fetch(f"{server.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == OTHER
    assert names(tmp_path) == ["a"]  # the part of the old version is gone too


def test_a_change_between_question_and_answer_starts_anew(server, tmp_path, monkeypatch):
    break_once(server, tmp_path / "a")
    answers = [download.describe(f"{server.url}/a")] * 2  # what the look at all files and the first attempt still see
    describe = download.describe
    monkeypatch.setattr(download, "describe", lambda url: answers.pop() if answers else describe(url))
    server.files["/a"] = OTHER
    fetch(f"{server.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == OTHER


def test_unavailable_twice_is_tried_again(server, tmp_path):
    server.unavailable["/a"] = 3  # the look for a connection is the first
    fetch(f"{server.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_not_found_is_not_tried_again_and_named_and_the_others_arrive(server, tmp_path):
    files = [(f"{server.url}/{name}", tmp_path / name) for name in ("a", "b")]
    with pytest.raises(UserError, match=r"1 of 2 files are missing.*: b \(HTTP 404 Not Found\)"):
        fetch_all(files)
    assert names(tmp_path) == ["a"]
    assert [entry for entry in server.log if entry[1] == "/b"] == [("HEAD", "/b", "", 404)]


@pytest.mark.parametrize("announced", [len(CONTENT) - 1, len(CONTENT) + 1])
def test_another_size_than_announced_is_an_error(server, tmp_path, announced):
    server.announce["/a"] = announced
    with pytest.raises(UserError, match=f"announces {announced} bytes and sends {len(CONTENT)}"):
        fetch(f"{server.url}/a", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_checksum_from_the_caller(server, tmp_path):
    fetch(f"{server.url}/a", tmp_path / "a", sha256=SHA256)
    with pytest.raises(UserError, match="checksum"):
        fetch(f"{server.url}/a", tmp_path / "b", sha256="0" * 64)
    assert not (tmp_path / "b").exists()


def test_checksum_from_the_hub_on_a_redirect(server, tmp_path):
    server.redirect["/hub"] = ("/a", SHA256)
    server.break_at["/a"] = [200_000]
    fetch(f"{server.url}/hub", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert [status for _, status in server.gets("/a")] == [200, 206]
    assert not [entry for entry in server.log if entry[:2] == ("HEAD", "/a")]  # a signed address is for GET only
    server.redirect["/hub"] = ("/a", "0" * 64)
    with pytest.raises(UserError, match="checksum"):
        fetch(f"{server.url}/hub", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_damaged_part_is_thrown_away(server, tmp_path):
    server.redirect["/hub"] = ("/a", SHA256)
    remote = download.describe(f"{server.url}/hub")
    part = download._part(download.File(f"{server.url}/hub", tmp_path / "a"), remote)
    part.write_bytes(b"x" * 1000)
    fetch(f"{server.url}/hub", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_plain_redirects_are_followed(server, tmp_path):
    server.redirect |= {"/moved": ("/a", ""), "/loop": ("/loop", "")}
    server.files["/loop"] = b""
    fetch(f"{server.url}/moved", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert download.describe(f"{server.url}/moved").size == len(CONTENT)
    with pytest.raises(UserError, match="redirects"):
        download.describe(f"{server.url}/loop")


def test_too_little_disk_is_known_before_the_first_byte(server, tmp_path, monkeypatch):
    server.files["/b"] = OTHER
    usage = namedtuple("usage", "total used free")(10**9, 0, len(CONTENT) + len(OTHER) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    files = [(f"{server.url}/{name}", tmp_path / name) for name in ("a", "b")]
    with pytest.raises(UserError, match="free some space"):
        fetch_all(files)
    assert not server.gets("/a") and not server.gets("/b") and names(tmp_path) == []


def test_what_has_arrived_needs_no_space(server, tmp_path, monkeypatch):
    part = break_once(server, tmp_path / "a")
    free = len(CONTENT) - part.stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(free))
    fetch(f"{server.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_full_disk_is_named_and_not_tried_again(server, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "_append", full)
    with pytest.raises(UserError, match="No space left on device"):
        fetch(f"{server.url}/a", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_offline_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no connection to 127.0.0.1:9, nothing was fetched") as error:
        fetch_all([(f"http://127.0.0.1:9/{i}", tmp_path / str(i)) for i in range(100)])
    assert "\n" not in str(error.value)


def start_fetch(url, path):
    code = f"from pathlib import Path; from nanochat.download import fetch; fetch({url!r}, Path({str(path)!r}))"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)


def wait_until(condition):
    while not condition():
        time.sleep(0.01)


def test_a_killed_download_is_continued(server, tmp_path):
    server.hold_at["/a"] = 200_000
    process = start_fetch(f"{server.url}/a", tmp_path / "a")
    wait_until(lambda: process.poll() is not None or any(p.stat().st_size > 100_000 for p in tmp_path.iterdir()))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "a").exists()
    [part] = tmp_path.iterdir()
    kept = part.stat().st_size
    server.hold_at.clear()
    fetch(f"{server.url}/a", tmp_path / "a")
    assert server.gets("/a")[-1] == (f"bytes={kept}-", 206)
    assert (tmp_path / "a").read_bytes() == CONTENT and names(tmp_path) == ["a"]


def test_two_processes_share_one_download(server, tmp_path):
    server.hold_at["/a"] = 200_000
    processes = [start_fetch(f"{server.url}/a", tmp_path / "a") for _ in range(2)]
    both_asked = lambda: sum(method == "HEAD" for method, *_ in server.log) == 6 and server.gets("/a")  # noqa: E731
    wait_until(lambda: both_asked() or any(process.poll() for process in processes))
    server.release.set()
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
    assert len(server.gets("/a")) == 1
    assert (tmp_path / "a").read_bytes() == CONTENT and names(tmp_path) == ["a"]
