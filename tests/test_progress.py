"""
Live progress: what a terminal shows, when it is plain instead, and how the terminal is left.

    python -m pytest tests/test_progress.py
"""

import logging
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pyte
import pytest
import rich
import torch

from nanochat import progress
from nanochat.distributed import Dist, warn0
from nanochat.logging import Logger
from nanochat.progress import Bar, RunBlock, Sparkline, is_live, track
from nanochat.train import TrainState

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
WIDTH, HEIGHT = 90, 24


class Terminal:
    """A pseudo-terminal: `file` to write to, and what a terminal shows of it."""

    def __init__(self):
        self.master, slave = pty.openpty()
        self.file = os.fdopen(slave, "w", encoding="utf-8")
        self.received = b""
        self.thread = threading.Thread(target=self._receive, daemon=True)
        self.thread.start()

    def _receive(self):
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # all writers have closed it
                return
            if not data:
                return
            self.received += data

    def __enter__(self):
        """From here on stdout and stderr are this terminal. (In a fixture, pytest would replace them again.)"""
        self.saved = sys.stdout, sys.stderr, sys.__stderr__
        sys.stdout = sys.stderr = sys.__stderr__ = self.file
        return self

    def __exit__(self, *error):
        sys.stdout, sys.stderr, sys.__stderr__ = self.saved
        self.close()

    def close(self):
        """Closes the file and waits until all that was written has arrived."""
        self.file.close()
        self.thread.join()

    def screen(self):
        screen = pyte.Screen(WIDTH, HEIGHT)
        pyte.ByteStream(screen).feed(self.received)
        return screen

    def lines(self):
        return [line.rstrip() for line in self.screen().display if line.strip()]


@pytest.fixture
def terminal(monkeypatch):
    """A terminal, to be used in a with statement. Everything is drawn at once."""
    terminal = Terminal()
    for name in ("NO_COLOR", "CI", "RANK", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("LINES", str(HEIGHT))
    monkeypatch.setattr(rich, "_console", None)  # get_console() makes a new one for this terminal
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.0)
    yield terminal
    if not terminal.file.closed:
        terminal.close()


def step(number, **metrics):
    return TrainState(number, seconds=2.0 * number, tokens=100 * number), {"train/loss": 5.0 - number / 10} | metrics


# ---- the block of a run ----


def test_block_shows_the_state_of_the_run(terminal):
    with terminal:
        with RunBlock("base_train-d4", num_steps=40, device=CPU) as block:
            for number in range(1, 21):
                metrics = {
                    "train/grad_norm": 0.41,
                    "train/tokens_per_second": 8412.3,
                    "train/mfu": 0.423,
                    "lr/wte": 0.3,
                }
                block.update(*step(number, **metrics))
                block.seek(number / 40, "shard 3")
            block.update(TrainState(20, seconds=40.0, tokens=2000), {"val/bpb": 1.2345})
    first, second, third, fourth = terminal.lines()
    assert re.fullmatch(r"base_train-d4  step 20 of 40  [━╸╺ ]+  50%  50s left", first)
    assert second == f"loss 3.0000 {block.losses}   val bpb 1.2345   gradient norm 0.41"
    assert re.fullmatch(r"8,412 tokens/s   MFU 42.3%   peak memory \d+\.\d GiB", third)
    assert fourth == "data: shard 3"


def test_block_without_a_number_of_steps_shows_the_share_of_the_data(terminal):
    with terminal:
        with RunBlock("chat_sft-d4", num_steps=0, device=CPU) as block:
            block.seek(0.25, "conversation 7")
            block.update(*step(10))
    assert re.match(r"chat_sft-d4  step 10  [━╸╺ ]+  25%  1m40s left", terminal.lines()[0])


def test_all_that_is_written_appears_above_the_block(terminal):
    with terminal:
        handler = logging.StreamHandler()  # keeps the present stderr, as torch's handlers do
        logger = logging.getLogger("nanochat.test_progress")
        logger.addHandler(handler)
        with RunBlock("base_train-d4", num_steps=9, device=CPU) as block:
            for number in range(1, 4):
                block.update(*step(number))
                print(f"printed {number}", flush=True)
                print(f"to stderr {number}", file=sys.stderr)
                logger.warning("logged %s", number)
                warn0(f"number {number}")
            block.update(*step(4))
        logger.removeHandler(handler)
    lines = terminal.lines()
    expected = []
    for number in range(1, 4):
        expected += [f"printed {number}", f"to stderr {number}", f"logged {number}", f"warning: number {number}"]
    assert lines[:-3] == expected
    assert lines[-3].startswith("base_train-d4  step 4 of 9")  # the block is there once, at the end
    assert handler.stream is terminal.file


def test_bar_is_shown_below_the_block_and_removed_at_its_end(terminal):
    with terminal:
        with RunBlock("base_train-d4", num_steps=9, device=CPU) as block:
            block.update(*step(1))
            with Bar("validation", total=8, unit="batches") as bar:
                bar.update(2)
                terminal.file.flush()
                shown = rich.get_console()._live_stack
                assert len(shown) == 2
            block.update(*step(2))
    assert b"validation" in terminal.received and b"2 of 8 batches" in terminal.received
    assert not [line for line in terminal.lines() if "validation" in line]
    assert terminal.lines()[0].startswith("base_train-d4  step 2 of 9")


def test_logger_shows_losses_in_the_block_and_prints_evaluations(terminal, tmp_path):
    with terminal:
        logger = Logger(tmp_path / "base_train-d4.jsonl", Dist(CPU), config={}, num_steps=3)
        with logger.live():
            for number in range(1, 4):
                logger.log(*step(number))
            logger.log(TrainState(3), {"val/bpb": 0.9})
        logger.log(*step(3))  # after the block, a plain line again
    lines = terminal.lines()
    assert lines[0] == "step 3/3 | val/bpb 0.9000"
    assert lines[1].startswith("base_train-d4  step 3 of 3") and lines[-1].startswith("step 3/3, 0s left | loss")
    assert len((tmp_path / "base_train-d4.jsonl").read_text().splitlines()) == 6


def test_sparkline_of_a_long_run_is_short_and_covers_all_of_it():
    line = Sparkline()
    for value in range(10_000, 0, -1):
        line.add(float(value))
    shown = str(line)
    assert progress.SPARK_WIDTH / 2 <= len(shown) <= progress.SPARK_WIDTH
    assert shown[0] == "█" and shown[-1] == "▁" and list(shown) == sorted(shown, reverse=True)
    assert str(Sparkline()) == ""


# ---- bars ----


def test_track_counts_the_items_on_a_bar(terminal):
    with terminal:
        assert list(track(["a", "b", "c"], "exporting", unit="tensors")) == ["a", "b", "c"]
    assert b"exporting" in terminal.received and b"2 of 3 tensors" in terminal.received
    assert terminal.lines() == []


def test_short_work_shows_no_bar(terminal, monkeypatch):
    with terminal:
        monkeypatch.setattr(progress, "REFRESH_SECONDS", 1000.0)
        assert list(track(range(5), "exporting")) == [0, 1, 2, 3, 4]
    assert terminal.received == b""


def test_bar_without_a_terminal_prints_lines_only_on_request(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with Bar("CORE", total=10, lines=True) as bar:
        bar.update(5)
    with Bar("CORE", unit="MB read", lines=True) as bar:
        bar.update(5)
    with Bar("CORE", total=10) as bar:
        bar.update(5)
    monkeypatch.setenv("RANK", "1")
    with Bar("CORE", total=10, lines=True) as bar:
        bar.update(5)
    assert capsys.readouterr().out.splitlines() == ["5 of 10 items, about 0s left", "5 MB read"]


# ---- when it is plain ----


@pytest.mark.parametrize(
    "variable", [("NO_COLOR", "1"), ("CI", "true"), ("RANK", "1"), ("TERM", "dumb"), ("TTY_COMPATIBLE", "0")]
)
def test_output_is_plain_on_request(terminal, monkeypatch, tmp_path, variable):
    with terminal:
        assert is_live()
        monkeypatch.setenv(*variable)
        monkeypatch.setattr(rich, "_console", None)
        assert not is_live()
        logger = Logger(tmp_path / "base_train-d4.jsonl", Dist(CPU), config={}, num_steps=3)
        with logger.live():
            logger.log(*step(1))
        assert list(track([1, 2], "exporting")) == [1, 2]
    assert terminal.received.decode().splitlines() == ["step 1/3, 4s left | loss 4.9000"]


def test_output_is_plain_in_a_file(terminal, monkeypatch, tmp_path):
    with terminal, (tmp_path / "log.txt").open("w") as file:
        assert is_live()
        monkeypatch.setattr(sys, "stdout", file)
        assert not is_live()


# ---- how the terminal is left ----

PROGRAM = """
import sys, time, torch
from nanochat import progress
from nanochat.train import TrainState
progress.REFRESH_SECONDS = 0.0
with progress.RunBlock("base_train-d4", num_steps=9, device=torch.device("cpu")) as block:
    block.update(TrainState(1), {"train/loss": 1.0})
    with progress.Bar("validation") as bar:
        bar.update(1)
        if sys.argv[1:] == ["crash"]:
            raise RuntimeError("crashed")
        time.sleep(600)
"""


@pytest.mark.slow  # each starts a process that imports torch
@pytest.mark.parametrize("how", ["crash", signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_terminal_is_usable_after_the_end(terminal, how):
    argv = [sys.executable, "-c", PROGRAM, *(["crash"] if how == "crash" else [])]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=terminal.file, stderr=terminal.file)
    if how != "crash":
        while b"1 items" not in terminal.received:
            assert process.poll() is None
            terminal.thread.join(0.02)
        process.send_signal(how)
    assert process.wait() != 0
    terminal.close()
    screen = terminal.screen()
    assert not screen.cursor.hidden
    assert screen.cursor.x == 0 and not screen.display[screen.cursor.y].strip()  # the prompt gets an empty line
    text = "\n".join(terminal.lines())
    assert text.startswith("base_train-d4  step 1 of 9")
    if how in ("crash", signal.SIGINT):
        assert "RuntimeError: crashed" in text or "KeyboardInterrupt" in text
        assert "validation" not in text.split("Traceback")[0]
