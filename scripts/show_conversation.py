"""
Show rendered conversations, with the tokens that the model is trained on in green and the others in grey.

    python -m scripts.show_conversation --path identity.jsonl --num 3
    python -m scripts.show_conversation --source gsm8k
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from nanochat.cli import COUNT, command, flag
from nanochat.conversation import render
from nanochat.tokenizer import Tokenizer, default_dir
from tasks.common import Task, limited
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.quiz import PrimerChat
from tasks.smoltalk import SmolTalk
from tasks.spelling import SimpleSpelling, SpellingBee

SUPERVISED_STYLE = "green"
CONTEXT_STYLE = "bright_black"

SOURCES: dict[str, Callable[[Tokenizer], Task]] = {
    "primer": lambda tokenizer: PrimerChat("train"),
    "smoltalk": lambda tokenizer: SmolTalk("train"),
    "mmlu": lambda tokenizer: MMLU("auxiliary_train"),
    "gsm8k": lambda tokenizer: GSM8K("train"),
    "simplespelling": lambda tokenizer: SimpleSpelling("train", tokenizer=tokenizer),
    "spellingbee": lambda tokenizer: SpellingBee("train", tokenizer=tokenizer),
}


@dataclass(frozen=True)
class Flags:
    path: str = flag("", "JSONL file, one array of messages per line; empty = --source")
    source: str = flag("primer", "dataset whose training conversations are shown", choices=tuple(SOURCES))
    num: int = flag(5, "number of conversations", COUNT)
    max_tokens: int = flag(2048, "tokens to which a conversation is truncated, as in training", COUNT)
    tokenizer_dir: str = flag("", "folder of the tokenizer; empty = tokenizer/ in $NANOCHAT_BASE_DIR")


@command
def main(flags: Flags) -> None:
    tokenizer = Tokenizer.load(Path(flags.tokenizer_dir or default_dir()))
    task = CustomJSON(flags.path) if flags.path else SOURCES[flags.source](tokenizer)
    console = Console()
    for i, conversation in enumerate(limited(task, flags.num)):
        ids, mask = render(conversation, tokenizer, flags.max_tokens)
        console.rule(f"{i}: {len(ids)} tokens, {sum(mask)} trained on")
        console.print(highlight(ids, mask, tokenizer))


def highlight(ids: Sequence[int], mask: Sequence[int], tokenizer: Tokenizer) -> Text:
    """Returns a rendered conversation with its supervised tokens in green."""
    text = Text()
    for supervised, group in itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        tokens = [token for token, _ in group]
        text.append(tokenizer.decode(tokens), SUPERVISED_STYLE if supervised else CONTEXT_STYLE)
    return text


if __name__ == "__main__":
    main()
