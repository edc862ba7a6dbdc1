"""
Two "hosts" in network namespaces of this machine run runs/nodes.sh, and something fails. Needs root and iproute2.

    python tests/nodes_trial.py kill           # a process is killed; the loss curve is that of an uninterrupted job
    python tests/nodes_trial.py cut            # the link is down for --seconds 30
    python tests/nodes_trial.py drop           # packets are dropped for --seconds 30, which ends all TCP connections
    python tests/nodes_trial.py lose           # a host is lost for good: the job continues on the other one
    python tests/nodes_trial.py resize         # a job that is stopped and continued on 1, 2, 4 and 1 ranks
    python tests/nodes_trial.py shard          # --shard against replicated weights
    python tests/nodes_trial.py rate           # seconds per step with a link of --mbit 10 (docs/scaling.md)

kill, cut, drop and shard take --ranks: processes per host, default 1. tests/test_nodes.py runs kill.
"""

import argparse
import json
import os
import shutil
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
# A tiny model; one rank has four micro-batches per step, four ranks have one each.
TINY = ("--aspect-ratio", "32", "--head-dim", "32")
WIDE = ("--aspect-ratio", "128", "--head-dim", "64")  # the smallest whose matrices --shard shards
FLAGS = ["--device", "cpu", "--no-compile", "--attention", "banded", "--depth", "1", "--max-seq-len", "64"]
FLAGS += ["--device-batch-size", "2", "--total-batch-size", "512", "--eval-every", "-1", "--sample-every", "-1"]
FLAGS += ["--save-every", str(SAVE_EVERY), "--model-tag", "trial"]
LIMIT_SECONDS = 900
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

    def set_link(self, is_up: bool) -> None:
        """Disconnects host 1, or connects it again. TCP repeats what is lost for a quarter of an hour."""
        ip("-n", self.names[1], "link", "set", self.links[1], "up" if is_up else "down")

    def drop(self, is_cut: bool) -> None:
        """
        Drops all packets of both hosts where they are sent, or no longer. TCP then repeats them every half second, and
        gives up after 15 times.
        """
        for name, link in zip(self.names, self.links, strict=True):
            action = ["add", "dev", link, "root", *DROP_ALL] if is_cut else ["del", "dev", link, "root"]
            subprocess.run(["tc", "-n", name, "qdisc", *action], check=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


class Job:
    """A training job; each host starts runs/nodes.sh with `ranks` processes."""

    def __init__(self, hosts: Hosts, bases: list[Path], flags: list[str], *, nodes: str = "2", ranks: int = 1):
        self.hosts = hosts
        self.bases = bases  # of the hosts that take part
        self.logs = [base.parent / f"{base.name}-host{i}.log" for i, base in enumerate(bases)]
        venv = bases[0].parent / "venv"
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        (venv / "bin/activate").write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')
        variables = {"NODES": nodes, "RANKS": str(ranks), "NANOCHAT_VENV": str(venv)}
        self.processes = [self._start(i, variables, flags) for i in range(len(bases))]

    def _start(self, host: int, variables: dict[str, str], flags: list[str]) -> subprocess.Popen:
        name = self.hosts.names[host]
        environment = os.environ | variables
        environment |= {
            "NODE_RANK": str(host),
            "MASTER": "10.77.0.1",
            "ADDRESS": f"10.77.0.{host + 1}",
            "GLOO_SOCKET_IFNAME": self.hosts.links[host],
            "NANOCHAT_BASE_DIR": str(self.bases[host]),
            "NANOCHAT_DTYPE": "float32",
            "OMP_NUM_THREADS": "1",
            "WAIT_MINUTES": "5",
        }
        script = 'hostname "$0"; exec bash runs/nodes.sh "$@"'
        words = ["unshare", "--uts", "bash", "-c", script, f"host{host}", *FLAGS, *flags]
        with self.logs[host].open("a") as log:
            command = ["ip", "netns", "exec", name, *words]
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def finish(self) -> None:
        """Waits for all hosts; their exit codes have to be 0."""
        codes = [process.wait(LIMIT_SECONDS) for process in self.processes]
        assert codes == [0] * len(codes), f"exit codes {codes}\n{self.text()}"

    def stop(self) -> None:
        """Stops the job as a user does: it saves a checkpoint."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(LIMIT_SECONDS)

    def losses(self) -> dict[int, float]:
        """Step → smoothed loss, as far as the metrics file goes."""
        file = self.bases[0] / "report/metrics/base_train-trial.jsonl"
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


def flags_of(model: tuple[str, ...] = TINY, num_steps: int = NUM_STEPS) -> list[str]:
    return [*model, "--num-iterations", str(num_steps)]


def make_base(folder: Path) -> Path:
    """A base folder with the tokenizer of the golden files."""
    from nanochat.tokenizer import Tokenizer

    Tokenizer.load(ROOT / "tests/golden/tokenizer").save(folder / "tokenizer")
    return folder


def run_job(base: Path, flags: list[str], ranks: int = 1, *, num_hosts: int = 2) -> dict[int, float]:
    """The losses of an uninterrupted job."""
    with Hosts() as hosts:
        job = Job(hosts, [base] * num_hosts, flags, nodes=str(num_hosts), ranks=ranks)
        job.finish()
        return job.losses()


def kill_a_process(base: Path, ranks: int = 1) -> tuple[dict[int, float], dict[int, float], str]:
    """
    Kills a rank of host 1 some steps after a checkpoint. Returns the losses until then, those at the end of the job, in
    which the steps since the checkpoint were made again, and its output.
    """
    with Hosts() as hosts:
        job = Job(hosts, [base, base], flags_of(), ranks=ranks)
        job.wait_for_step(SAVE_EVERY + 3)
        os.kill(hosts.rank_pid(1), signal.SIGKILL)
        before = job.losses()
        job.finish()
        return before, job.losses(), job.text()


def cut_the_link(base: Path, ranks: int, seconds: float, *, drop: bool) -> dict[int, float]:
    """Cuts the link some steps after a checkpoint, with the connections or without. Returns the losses."""
    with Hosts() as hosts:
        job = Job(hosts, [base, base], flags_of(), ranks=ranks)
        job.wait_for_step(SAVE_EVERY + 3)
        if drop:
            hosts.drop(True)
        else:
            hosts.set_link(is_up=False)
        time.sleep(seconds)
        if drop:
            hosts.drop(False)
        else:
            hosts.set_link(is_up=True)
        start = time.monotonic()
        seen = len(job.losses())
        print(f"the link is back after step {seen}", flush=True)
        wait_until(lambda: len(job.losses()) > seen)
        print(f"step {seen + 1} is done {time.monotonic() - start:.1f} s later", flush=True)
        job.finish()
        print_restarts(job)
        return job.losses()


def print_restarts(job: Job) -> None:
    words = ("error: ", "resuming", "starting it again")
    print(*[line for line in job.text().splitlines() if any(word in line for word in words)], sep="\n", flush=True)


def lose_a_host(base: Path) -> None:
    """Host 1 loses its link and its processes for good. The job continues on host 0."""
    with Hosts() as hosts:
        job = Job(hosts, [base, base], flags_of(), nodes="1:2")
        job.wait_for_step(SAVE_EVERY + 2)
        start = time.monotonic()
        hosts.set_link(is_up=False)
        for pid in hosts.pids(hosts.names[1]):
            os.kill(pid, signal.SIGKILL)
        code = job.processes[0].wait(LIMIT_SECONDS)
        print(f"exit code {code} after {time.monotonic() - start:.0f} s, {len(job.losses())} steps")
        print_restarts(job)


def resize_a_job(base: Path, flags: list[str]) -> dict[int, float]:
    """The losses of a job on 1, 2, 4 and 1 ranks: it is stopped at some step and continued with the next number."""
    with Hosts() as hosts:
        for num_hosts, ranks, last_step in ((1, 1, 20), (2, 1, 40), (2, 2, 60), (1, 1, None)):
            job = Job(hosts, [base] * num_hosts, flags, nodes=str(num_hosts), ranks=ranks)
            if last_step is None:
                job.finish()
            else:
                job.wait_for_step(last_step)
                job.stop()
            print(f"{num_hosts * ranks} ranks until step {max(job.losses())}", flush=True)
        return job.losses()


def seconds_at_rate(base: Path, rate: float) -> float:
    """The median time of a step of an uninterrupted job; rate: Mbit/s of the link in each direction."""
    with Hosts() as hosts:
        for name, link in zip(hosts.names, hosts.links, strict=True):
            limits = ["rate", f"{rate}mbit", "burst", "64kb", "limit", "4mb"]
            subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", link, "root", "tbf", *limits], check=True)
        Job(hosts, [base, base], flags_of(num_steps=30)).finish()
    lines = map(json.loads, (base / "report/metrics/base_train-trial.jsonl").read_text().splitlines())
    return statistics.median(512 / line["train/tokens_per_second"] for line in lines if line.get("step", 0) > 5)


def print_difference(expected: dict[int, float], found: dict[int, float]) -> None:
    assert expected.keys() == found.keys()
    difference = max(abs(found[step] / loss - 1) for step, loss in expected.items())
    last = max(expected)
    print(f"loss after step {last}: {expected[last]:.6f}, in the trial {found[last]:.6f}")
    print(f"largest relative difference of a loss in {len(expected)} steps: {difference:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=["kill", "cut", "drop", "lose", "resize", "shard", "rate"])
    parser.add_argument("--ranks", type=int, default=1, help="processes per host")
    parser.add_argument("--seconds", type=float, default=30.0, help="time without the link")
    parser.add_argument("--mbit", type=float, default=10.0, help="rate of the link, Mbit/s")
    args = parser.parse_args()
    os.environ.setdefault("NANOCHAT_DATA_DIR", str(ROOT / "tests/golden/packing/data"))
    with tempfile.TemporaryDirectory() as name:
        run_trial(args, make_base(Path(name) / "trial"), make_base(Path(name) / "reference"))


def run_trial(args: argparse.Namespace, base: Path, reference: Path) -> None:
    flags = flags_of()
    ranks = args.ranks
    num_hosts = 2
    if args.trial == "rate":
        print(f"median seconds per step: {seconds_at_rate(base, args.mbit):.3f}")
        return
    if args.trial == "lose":
        lose_a_host(base)
        return
    if args.trial == "kill":
        _, found, _ = kill_a_process(base, ranks)
    elif args.trial == "resize":
        flags = flags_of(num_steps=80)
        ranks = num_hosts = 1  # the order of the text is that of the number of ranks at the start
        found = resize_a_job(base, flags)
    elif args.trial == "shard":
        flags = flags_of(WIDE, num_steps=40)
        found = run_job(base, [*flags, "--shard"], ranks)
    else:
        found = cut_the_link(base, ranks, args.seconds, drop=args.trial == "drop")
    # Measurements of the machine choose between products that differ in their last bits.
    shutil.copytree(base / "measurements", reference / "measurements", dirs_exist_ok=True)
    print_difference(run_job(reference, flags, ranks, num_hosts=num_hosts), found)


if __name__ == "__main__":
    main()
