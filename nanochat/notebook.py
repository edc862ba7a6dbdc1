"""
A trained model for notebooks and short programs: chat and continue text in three lines.

    from nanochat import load
    model = load("sft")
    model.chat("What is 12 * 13?")                          # the reply, a string; the conversation is kept
    model.generate("The capital of France is")              # the continuation of a text, for base models

`model.model` is the torch module, `model.tokenizer` the tokenizer, `model.engine` generates batches.
"""

from dataclasses import replace
from typing import Any

from nanochat import checkpoint_manager, hardware
from nanochat.conversation import completion_text, read_parts, render_to_fit
from nanochat.engine import Engine
from nanochat.request import Request


class LoadedModel:
    """
    A model with its tokenizer, its engine and one conversation. `messages` is the conversation so far, and `sampling`
    has the defaults of both methods: 512 tokens, temperature 0.6, top-k 50.
    """

    def __init__(self, stage: str, tag: str, step: int, device: str):
        """Arguments as the flags -i, -g, -s and --device of chat_cli. UserError if there is no such checkpoint."""
        torch_device = hardware.pick_device(device)
        dtype = hardware.pick_dtype(torch_device)
        self.model, self.tokenizer, self.checkpoint = checkpoint_manager.load_model(
            stage, tag, step, torch_device, dtype
        )
        self.engine = Engine(self.model, self.tokenizer, max_slots=1)
        self.sampling = Request([], max_tokens=512, temperature=0.6, top_k=50)
        self.messages: list[dict[str, Any]] = []

    def chat(self, message: str, **sampling: Any) -> str:
        """
        Returns the reply to a message, which continues the conversation. When the context is full, the oldest messages
        are left out. sampling: fields of engine.Request, such as temperature=0. UserError if the message is too long.
        """
        request = replace(self.sampling, **sampling)
        messages = [*self.messages, {"role": "user", "content": message}]
        context = self.model.config.sequence_len
        prompt, _ = render_to_fit({"messages": messages}, self.tokenizer, context, request.max_tokens)
        tokens = self._generate(replace(request, prompt=prompt))
        self.messages = [*messages, {"role": "assistant", "content": read_parts(tokens, self.tokenizer)}]
        return completion_text(tokens, self.tokenizer)

    def clear(self) -> None:
        """Starts a new conversation."""
        self.messages = []

    def generate(self, text: str, **sampling: Any) -> str:
        """Returns the continuation of a text. sampling: fields of engine.Request."""
        prompt = [self.tokenizer.bos, *self.tokenizer.encode(text)]
        tokens = self._generate(replace(self.sampling, prompt=prompt, **sampling))
        return self.tokenizer.decode(tokens)

    def _generate(self, request: Request) -> list[int]:
        (completion,) = self.engine.generate([request])
        return completion.tokens

    def __repr__(self) -> str:
        return f"<nanochat model {self.checkpoint.path}>"
