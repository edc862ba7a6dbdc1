"""
Import a model as a checkpoint, to chat with, evaluate, fine-tune, serve or export.

    python -m scripts.import_model karpathy/nanochat-d32 --model-tag d32       # from the hub
    python -m scripts.import_model my-model --model-tag mine -i sft            # a folder
    python -m scripts.import_model my-model --model-tag mine -i mid            # to fine-tune it with chat_sft -i mid

SOURCE is a Hugging Face folder (NanoChatForCausalLM, or what scripts.export wrote), a nanochat checkpoint folder
(model_*.pt, meta_*.json, tokenizer.pkl), or a repository of the hub with one of these. A tokenizer that differs from
the one in place is kept beside it and used for this model.
"""

from dataclasses import MISSING, dataclass
from pathlib import Path

from nanochat import checkpoint_manager
from nanochat.cli import command, flag
from nanochat.common import UserError
from nanochat.costs import param_counts
from nanochat.export.importer import import_model


@dataclass(frozen=True)
class Flags:
    source: list[str] = flag(MISSING, "folder, or repository of the hub as owner/name")
    model_tag: str = flag("", "name for the checkpoint", short="-g")
    stage: str = flag("sft", "stage of the model", short="-i", choices=("base", "mid", "sft", "rl"))


@command
def main(flags: Flags) -> Path:
    """Returns the folder of the checkpoint."""
    if len(flags.source) != 1:
        raise UserError(f"{len(flags.source)} sources: import one at a time")
    if not flags.model_tag:
        raise UserError("--model-tag is missing: choose a name for the model, such as d32")
    [source] = flags.source
    path = import_model(source, flags.stage, flags.model_tag)
    checkpoint = checkpoint_manager.find(flags.stage, flags.model_tag)
    print(f"imported {source} to {path}: {param_counts(checkpoint.config)['total']:,} parameters")
    print(f"chat with it: python -m scripts.chat_cli -i {flags.stage} -g {flags.model_tag}")
    return path


if __name__ == "__main__":
    main()
