"""
Print the table of runs/scaling_laws.sh: validation bits per byte by FLOP budget and depth, and the best depth of each.

    python -m scripts.scaling_laws
"""

from dataclasses import dataclass
from pathlib import Path

from nanochat.cli import command
from nanochat.common import UserError, human
from nanochat.logging import print_table, read_lines, report_dir


@dataclass(frozen=True)
class Flags:
    pass


@dataclass(frozen=True, order=True)
class Result:
    """The last validation of one run."""

    flops: float
    depth: int
    tokens: int
    bits_per_byte: float


def read_result(path: Path) -> Result | None:
    """The result in a metrics file of base_train; None for a run without a validation. UserError if it is damaged."""
    lines = read_lines(path)
    validations = [line["val/bpb"] for line in lines if "val/bpb" in line]
    if not validations:
        return None
    try:
        flags, recipe = lines[0]["config"]["flags"], lines[0]["config"]["recipe"]
        numbers = flags["target_flops"], flags["depth"], recipe["horizon"], validations[-1]
        if not all(isinstance(number, (int, float)) for number in numbers):
            raise TypeError("a value is not a number")
    except (LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and run this training again") from error
    return Result(*numbers)


def table(results: list[Result]) -> list[tuple[str, ...]]:
    """One row per run, by budget and depth."""
    rows: list[tuple[str, ...]] = [("FLOPs", "depth", "tokens", "bits per byte", "")]
    for result in sorted(results):
        best = min(other.bits_per_byte for other in results if other.flops == result.flops)
        mark = "best" if result.bits_per_byte == best else ""
        numbers = (f"{result.flops:.0e}", str(result.depth), human(result.tokens), f"{result.bits_per_byte:.4f}")
        rows.append((*numbers, mark))
    return rows


@command
def main(flags: Flags) -> None:
    folder = report_dir() / "metrics"
    found = [read_result(path) for path in folder.glob("base_train-flops-*.jsonl")]
    results = [result for result in found if result]
    if not results:
        raise UserError(f"{folder} has no finished run of runs/scaling_laws.sh: run it first")
    print_table("Scaling laws", table(results))


if __name__ == "__main__":
    main()
