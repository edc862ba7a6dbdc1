"""
nanochat: a small ChatGPT trained from nothing. For notebooks:

    from nanochat import load
    model = load()                                          # the newest fine-tuned model
    print(model.chat("What is the capital of France?"))     # continues the conversation with each call
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanochat.notebook import LoadedModel


def load(stage: str = "sft", tag: str = "", step: int = -1, device: str = "auto") -> "LoadedModel":
    """
    Loads a trained model, by default the newest one of its stage. UserError if there is none; see notebook.LoadedModel
    for what it can do.
    """
    from nanochat.notebook import LoadedModel  # importing nanochat alone takes no time

    return LoadedModel(stage, tag, step, device)
