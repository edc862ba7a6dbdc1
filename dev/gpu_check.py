"""
Runs the parts of the GPU check (gpu_parts.py), each in a separate process with a time limit, because a CUDA error
spoils its process. Results are written after each part; a later call runs only what has not passed.

    bash dev/gpu_check.sh --help
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_parts import IS_NULL_GPU, PARTS, ROOT, Check, version

from nanochat import hardware
from nanochat.common import base_dir

TOTAL_SECONDS = 480
DRY_FACTOR = 8  # on all limits in a dry run: a CPU is slow, and perhaps busy with other work


def main() -> None:
    args = parse_arguments()
    if args.part is not None:
        run_part(args.part, args.out, args.dry_run)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    facts = describe(args.commit) | {"dry": args.dry_run}
    results = json.loads(file.read_text()) if file.exists() else {}
    if {name: results.get(name) for name in facts} != facts:  # of another commit or machine
        results = facts | {"parts": {}}
    results["date"] = datetime.date.today().isoformat()
    passed = {int(number) for number, part in results["parts"].items() if part["status"] == "passed"}
    todo = args.parts or [number for number in range(len(PARTS)) if number not in passed]

    factor = DRY_FACTOR if args.dry_run else 1
    deadline = time.monotonic() + factor * TOTAL_SECONDS
    for i, number in enumerate(todo):
        reserved = sum(factor * PARTS[later][1] for later in todo[i + 1 :])
        remaining = deadline - time.monotonic()
        limit = min(remaining, max(factor * PARTS[number][1], remaining - reserved))  # unused time passes on
        part = start_part(number, args.out, args.dry_run, limit)
        results["parts"][str(number)] = part
        file.write_text(json.dumps(results, indent=1) + "\n")
        (args.out / "table.md").write_text(table(results), encoding="utf-8")
        print(f"{number} {part['part']}: {part['status']}, {part['seconds']} s {part['error']}", flush=True)
    print(f"\n{table(results)}\n{file}")
    sys.exit(any(part["status"] != "passed" for part in results["parts"].values()))


def parse_arguments() -> argparse.Namespace:
    names = ", ".join(f"{number} {part.__name__}" for number, (part, _) in enumerate(PARTS))
    parser = argparse.ArgumentParser(prog="bash dev/gpu_check.sh", epilog=f"parts: {names}")
    parser.add_argument("parts", nargs="*", type=int, metavar="PART", help="default: all that have not passed yet")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on any device")
    parser.add_argument("--out", type=Path, help="folder of results.json, table.md and the logs")
    parser.add_argument("--commit", default="", help="for the table, where there is no git")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)  # of a process of this program
    args = parser.parse_args()
    if not set(args.parts) <= set(range(len(PARTS))):
        parser.error(f"parts are numbers from 0 to {len(PARTS) - 1}")
    args.out = (args.out or base_dir() / ("gpu_check-dry" if args.dry_run else "gpu_check")).resolve()
    return args


def describe(commit: str) -> dict[str, str]:
    """What results must have in common to share a table."""
    if not commit:
        git = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}, Triton {version('triton')}"
    return {"commit": commit, "card": f"{card} (null GPU)" if IS_NULL_GPU else card, "versions": versions}


def start_part(number: int, folder: Path, dry: bool, limit: float) -> dict[str, Any]:
    """Runs a part in a new process for at most `limit` seconds; returns its status, last line and rows."""
    rows, log = folder / f"part_{number}.jsonl", folder / f"part_{number}.log"
    rows.write_text("")
    command = [sys.executable, __file__, "--out", str(folder), "--part", str(number), *["--dry-run"] * dry]
    start = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = "failed" if process.wait(max(limit, 1)) else "passed"
        except subprocess.TimeoutExpired:
            status = f"not finished in {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
                process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return {
        "part": PARTS[number][0].__name__,
        "status": status,
        "seconds": round(time.perf_counter() - start, 1),
        "error": "" if status == "passed" or not lines else lines[-1][:200],
        "rows": [json.loads(line) for line in rows.read_text().splitlines()],
    }


def run_part(number: int, folder: Path, dry: bool) -> None:
    """What the process of a part does."""
    if IS_NULL_GPU:
        sys.path.insert(0, str(ROOT / "dev/null_gpu"))
        import counts

        counts.ignore_numbers()
    device = hardware.pick_device()
    if device.type != "cuda" and not dry:
        raise SystemExit("there is no usable CUDA GPU: check nvidia-smi, or use --dry-run")
    PARTS[number][0](Check(device, dry, folder, folder / f"part_{number}.jsonl"))


def table(results: dict[str, Any]) -> str:
    """The results as Markdown, for dev/gpu.md."""
    title = "Dry run" if results["dry"] else "GPU check"
    lines = [
        f"## {title}, {results['date']}: {results['card']}",
        f"Commit {results['commit']}; {results['versions']}.",
        "",
        "| part | what | measured | estimate |",
        "| --- | --- | ---: | ---: |",
    ]
    for number, part in sorted(results["parts"].items(), key=lambda item: int(item[0])):
        lines.append(
            table_row(number, f"**{part['part']}**: {part['status']} {part['error']}", f"{part['seconds']} s", "")
        )
        for row in part["rows"]:
            estimate = row["estimate"]
            if isinstance(estimate, float):
                estimate = f"{estimate:g} ({row['measured'] / estimate - 1:+.0%})"
            lines.append(table_row("", row["what"], f"{row['measured']} {row['unit']}", estimate))
    return "\n".join(lines) + "\n"


def table_row(*cells: str) -> str:
    return f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in cells)} |"


if __name__ == "__main__":
    main()
