r"""
Train a base model on conversations before fine-tuning (older recipes have this stage between base and SFT). Same as
scripts/chat_sft.py with other defaults: one epoch of questions and problems, at the learning rates of pretraining.

    python -m scripts.mid_train                                                       # base → mid
    python -m scripts.chat_sft -i mid                                                 # mid → sft
    python -m scripts.mid_train --smoltalk-epochs 0 --mmlu-epochs 0 --gsm8k-epochs 0 \
        --simplespelling-epochs 0 --spellingbee-epochs 0 --primer-epochs 1            # the primer's conversations only
    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train
"""

from dataclasses import dataclass

from nanochat.cli import NOT_NEGATIVE, POSITIVE, command, flag
from nanochat.report.record import recorded
from scripts.chat_sft import FinetuneFlags, finetune


@dataclass(frozen=True)
class Flags(FinetuneFlags):
    mmlu_epochs: int = flag(1, "times through MMLU's auxiliary training questions; 0 = without", NOT_NEGATIVE)
    gsm8k_epochs: int = flag(1, "times through GSM8K's training problems; 0 = without", NOT_NEGATIVE)
    # 0.085 bits per byte on the primer's conversations against 0.088 with 0.8 (depth 4, one run each).
    init_lr_frac: float = flag(1.0, "initial learning rates, as a share of pretraining's", POSITIVE)


@command
@recorded("mid_train")
def main(flags: Flags) -> None:
    finetune("mid", "base", flags)


if __name__ == "__main__":
    main()
