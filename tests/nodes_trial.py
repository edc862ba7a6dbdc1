"""
Two "hosts" in network namespaces of this machine run runs/nodes.sh, and something fails. Needs root and iproute2.

    python tests/nodes_trial.py                # a process is killed; the loss curve is that of an uninterrupted job
    python tests/nodes_trial.py --cut 30       # the link is cut for that many seconds: the job waits and continues
    python tests/nodes_trial.py --rate 10      # seconds per step with a link of that many Mbit/s (docs/scaling.md)
    python tests/nodes_trial.py --lose         # a node is lost for good: the job continues on the other one

tests/test_nodes.py runs the first of them.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUM_STEPS, SAVE_EVERY = 150, 15
# A tiny model; both ranks have one micro-batch per step, one rank alone has two.
FLAGS = ["--device", "cpu", "--no-compile", "--attention", "banded", "--depth", "1", "--aspect-ratio", "32"]
FLAGS += ["--head-dim", "32", "--max-seq-len", "64", "--device-batch-size", "4", "--total-batch-size", "512"]
FLAGS += ["--save-every", str(SAVE_EVERY), "--eval-every", "-1", "--sample-every", "-1", "--model-tag", "trial"]
LIMIT_SECONDS = 400
DROP_ALL = "tbf rate 8bit burst 1 limit 1".split()  # every packet is larger than the burst


def is_permitted() -> bool:
    """Whether this process may make network namespaces."""
    name = f"trial{os.getpid()}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
    return made and subprocess.run(["ip", "netns", "del", name], capture_output=True).returncode == 0


class Hosts:
    """Two network namespaces, joined by a link. Use it in a with statement."""

    def __init__(self) -> None:
        self.names = [f"nc{os.getpid()}h{i}" for i in range(2)]
        self.links = [f"v{os.getpid()}h{i}" for i in range(2)]

    def __enter__(self) -> "Hosts":
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1])
        for i, (name, link) in enumerate(zip(self.names, self.links, strict=True)):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", link)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", link, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            for pid in self.pids(name):
                os.kill(pid, signal.SIGKILL)
            ip("netns", "del", name)

    def pids(self, name: str) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True)
        return [int(pid) for pid in listed.stdout.split()]

    def rank_pid(self, host: int) -> int:
        """The process of this host that trains; its parents are torchrun and bash."""
        for pid in self.pids(self.names[host]):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if "scripts.base_train" in words and not any("torchrun" in word for word in words):
                return pid
        raise RuntimeError(f"no rank runs on host {host}")

    def cut(self, is_cut: bool) -> None:
        """Cuts the link in both directions, or joins it again."""
        for name, link in zip(self.names, self.links, strict=True):
            action = ["add", "dev", link, "root", *DROP_ALL] if is_cut else ["del", "dev", link, "root"]
            subprocess.run(["tc", "-n", name, "qdisc", *action], check=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


class Job:
    """A training job on two hosts, each of which starts runs/nodes.sh."""

    def __init__(self, hosts: Hosts, folder: Path, bases: list[Path], nodes: str = "2", num_steps: int = NUM_STEPS):
        self.hosts = hosts
        self.bases = bases  # of the two hosts
        self.logs = [folder / f"host{i}.log" for i in range(2)]
        venv = folder / "venv/bin"
        venv.mkdir(parents=True, exist_ok=True)
        (venv / "activate").write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')
        flags = [*FLAGS, "--num-iterations", str(num_steps)]
        self.processes = [self._start(i, nodes, venv.parent, flags) for i in range(2)]

    def _start(self, host: int, nodes: str, venv: Path, flags: list[str]) -> subprocess.Popen:
        name = self.hosts.names[host]
        environment = os.environ | {
            "NODES": nodes,
            "NODE_RANK": str(host),
            "MASTER": "10.77.0.1",
            "ADDRESS": f"10.77.0.{host + 1}",
            "GLOO_SOCKET_IFNAME": self.hosts.links[host],
            "NANOCHAT_VENV": str(venv),
            "NANOCHAT_BASE_DIR": str(self.bases[host]),
            "NANOCHAT_DTYPE": "float32",
            "OMP_NUM_THREADS": "1",
            "WAIT_MINUTES": "5",
        }
        script = 'hostname "$0"; exec bash runs/nodes.sh "$@"'
        command = ["ip", "netns", "exec", name, "unshare", "--uts", "bash", "-c", script, f"host{host}", *flags]
        with self.logs[host].open("w") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def wait(self) -> list[int]:
        """The exit codes of both hosts."""
        return [process.wait(LIMIT_SECONDS) for process in self.processes]

    def losses(self, host: int = 0) -> dict[int, float]:
        """Step → smoothed loss, as far as the metrics file goes."""
        file = self.bases[host] / "report/metrics/base_train-trial.jsonl"
        text = file.read_text() if file.exists() else ""
        lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: max(self.losses(), default=0) >= step)

    def text(self) -> str:
        return "".join(log.read_text() for log in self.logs)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "nothing has happened for too long"
        time.sleep(0.02)


def make_base(folder: Path) -> Path:
    """A base folder with the tokenizer of the golden files."""
    from nanochat.tokenizer import Tokenizer

    Tokenizer.load(ROOT / "tests/golden/tokenizer").save(folder / "tokenizer")
    return folder


def run_job(folder: Path) -> dict[int, float]:
    """The losses of an uninterrupted job."""
    base = make_base(folder / "uninterrupted")
    with Hosts() as hosts:
        job = Job(hosts, folder, [base, base])
        assert job.wait() == [0, 0], job.text()
        return job.losses()


def kill_a_process(folder: Path) -> tuple[dict[int, float], dict[int, float], str]:
    """
    Kills a rank of host 1 some steps after a checkpoint. Returns the losses until then, those at the end of the job, in
    which the steps since the checkpoint were made again, and its output.
    """
    base = make_base(folder / "killed")
    with Hosts() as hosts:
        job = Job(hosts, folder, [base, base])
        job.wait_for_step(SAVE_EVERY + 3)
        os.kill(hosts.rank_pid(1), signal.SIGKILL)
        before = job.losses()
        assert job.wait() == [0, 0], job.text()
        return before, job.losses(), job.text()


def seconds_at_rate(folder: Path, rate: float) -> float:
    """The median time of a step of an uninterrupted job; rate: Mbit/s of the link in each direction."""
    base = make_base(folder / "rate")
    with Hosts() as hosts:
        for name, link in zip(hosts.names, hosts.links, strict=True):
            limits = ["rate", f"{rate}mbit", "burst", "64kb", "limit", "4mb"]
            subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", link, "root", "tbf", *limits], check=True)
        job = Job(hosts, folder, [base, base], num_steps=30)
        assert job.wait() == [0, 0], job.text()
    lines = map(json.loads, (base / "report/metrics/base_train-trial.jsonl").read_text().splitlines())
    return statistics.median(512 / line["train/tokens_per_second"] for line in lines if line.get("step", 0) > 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cut", type=float, default=0.0, help="seconds without the link")
    parser.add_argument("--rate", type=float, default=0.0, help="Mbit/s of the link")
    parser.add_argument("--lose", action="store_true", help="host 1 loses its link and its processes for good")
    args = parser.parse_args()
    os.environ.setdefault("NANOCHAT_DATA_DIR", str(ROOT / "tests/golden/packing/data"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.rate:
            print(f"median seconds per step: {seconds_at_rate(folder, args.rate):.3f}")
            return
        if not args.cut and not args.lose:
            expected = run_job(folder)
            _, found, _ = kill_a_process(folder)
            print(f"last loss {expected[NUM_STEPS]:.6f}, after a kill {found[NUM_STEPS]:.6f}")
            print(f"same curve: {expected == found}")
            return
        bases = [make_base(folder / "base")] * 2
        with Hosts() as hosts:
            job = Job(hosts, folder, bases, nodes="1:2" if args.lose else "2", num_steps=3000)
            job.wait_for_step(SAVE_EVERY + 2)
            start = time.monotonic()
            hosts.cut(True)
            if args.lose:
                job.processes[1].kill()
                for pid in hosts.pids(hosts.names[1]):
                    os.kill(pid, signal.SIGKILL)
            else:
                time.sleep(args.cut)
                hosts.cut(False)
                seen = len(job.losses())
                wait_until(lambda: len(job.losses()) > seen)
                print(f"continued {time.monotonic() - start - args.cut:.1f} s after the link was back")
            codes = [process.wait(LIMIT_SECONDS) for process in job.processes[: 1 if args.lose else 2]]
            print(f"exit codes {codes} after {time.monotonic() - start:.0f} s, {len(job.losses())} steps")
            shown = [line for line in job.text().splitlines() if "error:" in line or "resuming" in line]
            print(*shown, sep="\n")


if __name__ == "__main__":
    main()
