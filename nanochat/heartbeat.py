"""
Finds ranks that died, so that no job waits for them: used by distributed.init when there are several ranks.

A thread of each rank writes a counter and the current step to the store of the process group every few seconds. One
rank per host reads those of all ranks. If the counter of a rank has stood still for LOST_SECONDS, or the rank reported
an error, it prints which rank, on which host, in which step, and ends its process; torchrun then ends the others of the
host, and restarts the job if it may (runs/nodes.sh).

The thread also beats while its rank compiles, evaluates or waits for a disk. So LOST_SECONDS can be short, while the
timeout of the collective operations (distributed.TIMEOUT) has to be long. That one would notice a lost node, too, but
only after an hour. The heartbeat tolerates a link that is cut for less than LOST_SECONDS; TCP may not, and then
torchrun ends, which runs/nodes.sh starts again.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

BEAT_SECONDS = 5.0
LOST_SECONDS = 120.0  # without a beat; also without contact to the store (heuristic, not tuned)
GRACE_SECONDS = 20.0  # after an error of another rank: the own error message, if there is one, is better


class Heartbeat:
    """The thread of one rank. `connect` returns a connection to the store that no other thread uses."""

    def __init__(self, connect: Callable[[], Any], rank: int, world_size: int, host: str, *, watches: bool):
        self.connect = connect
        self.rank = rank
        self.world_size = world_size
        self.host = host
        self.watches = watches  # whether this rank looks at the others
        self.place = "before the first step"  # where the program is, for messages
        self.store: Any = None
        self.count = 0
        self.seen: dict[int, tuple[int, float]] = {}  # rank → its counter, and when it last changed
        self.last_contact = time.monotonic()  # with the store
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Sends the first beat and starts the thread. Afterwards all ranks have to meet once, before a rank ends."""
        self._beat("runs")
        self.thread.start()

    def close(self, state: str) -> None:
        """Ends the thread. state: "done" or "failed", for the other ranks."""
        self.stopping.set()
        self.thread.join()
        try:
            self._beat(state)
        except RuntimeError:
            pass  # the store has ended with its process, and with it all readers

    def describe_others(self) -> str:
        """The ranks that are furthest behind, for messages; empty if the store cannot be read."""
        try:
            beats = self._read()
        except RuntimeError:
            return ""
        others = [
            f"rank {rank} on {beat['host']}: {beat['place']}" for rank, beat in enumerate(beats) if rank != self.rank
        ]
        return "; ".join(others[:8])

    def _run(self) -> None:
        while not self.stopping.wait(BEAT_SECONDS):
            try:
                self._beat("runs")
                problem = self._look() if self.watches else ""
                self.last_contact = time.monotonic()
            except RuntimeError as error:  # torch raises its subclasses if the network or the host of the store fails
                self.store = None
                lost = time.monotonic() - self.last_contact
                problem = f"no contact to the store of rank 0 for {lost:.0f} s ({error})" if lost > LOST_SECONDS else ""
            if problem and not self.stopping.is_set():
                self._end(problem)

    def _beat(self, state: str) -> None:
        self.store = self.store or self.connect()
        self.count += 1
        beat = {"count": self.count, "place": self.place, "host": self.host, "state": state}
        self.store.set(str(self.rank), json.dumps(beat))

    def _read(self) -> list[dict[str, Any]]:
        return [json.loads(value) for value in self.store.multi_get([str(rank) for rank in range(self.world_size)])]

    def _look(self) -> str:
        """Reads the beats of all ranks; returns what is wrong, if anything is."""
        now = time.monotonic()
        for rank, beat in enumerate(self._read()):
            name = f"rank {rank} on {beat['host']}"
            if beat["state"] == "done" or rank == self.rank:
                continue
            if self.seen.get(rank, (0, now))[0] != beat["count"]:
                self.seen[rank] = (beat["count"], now)
            silence = now - self.seen[rank][1]
            if beat["state"] == "failed" and silence > GRACE_SECONDS:
                return f"{name} ended with an error, {beat['place']}"
            if silence > LOST_SECONDS:
                return f"{name} has not responded for {silence:.0f} s; it was {beat['place']}"
        return ""

    def _end(self, problem: str) -> None:
        """Ends the process at once: the main thread may wait in a collective operation, where nothing interrupts it."""
        message = f"error: {problem}: ending rank {self.rank} on {self.host}, which is {self.place}"
        print(" ".join(message.split()), file=sys.stderr, flush=True)
        os._exit(1)
