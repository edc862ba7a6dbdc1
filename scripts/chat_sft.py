"""
Fine-tune a base model on conversations.

    python -m scripts.chat_sft                                                        # the usual mixture
    python -m scripts.chat_sft --smoltalk-epochs 0 --mmlu-epochs 0 --gsm8k-epochs 0 \\
        --simplespelling-epochs 0 --spellingbee-epochs 0 --primer-epochs 2            # the primer's conversations alone
    python -m scripts.chat_sft --identity-file mine.jsonl                             # with conversations of your own
    python -m scripts.chat_sft -i mid                                                 # of a model that mid_train made
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft
"""

from dataclasses import dataclass

from nanochat.cli import command, flag
from tasks import finetune


@dataclass(frozen=True)
class Flags(finetune.Flags):
    source: str = flag("base", "stage to start from", short="-i", choices=("base", "mid"))


@command
def main(flags: Flags) -> None:
    finetune.finetune("sft", flags.source, flags)


if __name__ == "__main__":
    main()
