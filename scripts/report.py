"""
Print the final numbers of all stages that have run, and write them to <base>/report/report.md.

    python -m scripts.report
"""

from dataclasses import dataclass

from nanochat.cli import command
from nanochat.logging import print_summary

STAGES = ("tok_train", "base_train", "base_eval", "mid_train", "chat_sft", "chat_rl")
CHAT_EVALS = ("chat_eval_base", "chat_eval_mid", "chat_eval_sft", "chat_eval_rl")


@dataclass(frozen=True)
class Flags:
    pass


@command
def main(flags: Flags) -> None:
    print_summary([*STAGES, *CHAT_EVALS])


if __name__ == "__main__":
    main()
