"""
Requests to the engine (engine.py): a prompt with its sampling parameters, its completion, and the state in between.
"""

import random
from array import array
from collections import deque
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import torch

from nanochat.common import UserError
from nanochat.decoder import StepToken
from nanochat.gpt import GPTConfig
from nanochat.sampling import SamplingParams
from nanochat.speculation import Drafter
from nanochat.tools import ToolUse

MIN_TEMPERATURE = 1e-30  # logits divided by a smaller temperature would overflow float32


@dataclass(frozen=True)
class Request:
    """A prompt with its sampling parameters."""

    prompt: list[int]
    max_tokens: int = 256  # new tokens, forced ones included
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # sample among the k most likely tokens; 0 = all
    top_p: float = 1.0  # sample among the fewest tokens whose probabilities add up to this; 1 = all
    seed: int = 0  # of the random numbers; in float32 on a CPU the completion depends on nothing else in the batch
    logprobs: bool = False  # return the log-probabilities of the tokens

    def validate(self, config: GPTConfig) -> None:
        """UserError for parameters out of range, or a prompt that does not fit the model."""
        context = config.sequence_len
        if not self.prompt:
            raise UserError(f"the prompt is empty: it needs 1 to {context} tokens")
        if len(self.prompt) > context:
            raise UserError(f"the prompt has {len(self.prompt)} tokens: the model's context has {context}")
        if not 0 <= min(self.prompt) <= max(self.prompt) < config.vocab_size:
            raise UserError(
                f"the prompt has tokens {min(self.prompt)} to {max(self.prompt)}: the model's vocabulary is 0 to "
                f"{config.vocab_size - 1}; encode it with the tokenizer that the model was trained with"
            )
        if self.max_tokens < 1:
            raise UserError(f"max_tokens {self.max_tokens}: must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature}: must be a number of at least 0 (0 = greedy)")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k}: must be at least 0 (0 = all tokens)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: must be above 0 and at most 1 (1 = all tokens)")
        if not -(2**63) <= self.seed < 2**64:
            raise UserError(f"seed {self.seed}: must be an integer of 64 bits")


@dataclass
class Completion:
    """The tokens generated after a prompt, without the end token."""

    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)  # per token; False: forced by a tool
    # One per token in nats, and one for the end token if it was sampled; empty unless the request asks for them.
    # Sampled tokens: under the distribution that they were sampled from; greedy ones: under the plain softmax; forced
    # ones: 0.
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""  # "stop": an end token; "length": max_tokens; "context": the model's context is full
    end_token: int = -1  # the end token that was sampled, if any


class Event(NamedTuple):
    """Something that happened to a request in a step."""

    number: int  # of the request
    token: int | None  # its next token; None: it has ended
    completion: Completion  # so far


class ActiveRequest:
    """A request with its state, from the queue until its completion has ended."""

    def __init__(self, number: int, request: Request, tools: ToolUse, config: GPTConfig, *, max_drafted: int = 0):
        """max_drafted: tokens to draft per step, for speculative decoding; 0 = off."""
        self.number, self.request, self.tools, self.max_drafted = number, request, tools, max_drafted
        room = config.sequence_len + 1 - len(request.prompt)  # + 1: the last token is never read
        self.limit = min(request.max_tokens, room)  # new tokens
        self.limit_reason = "context" if room < request.max_tokens else "length"
        self.params = params = sampling_params(request, config.vocab_size)
        sampling = (params.top_k or config.vocab_size, params.temperature, params.top_p)
        last_two = [0, *request.prompt][-2:]
        self.next_read: StepToken = array("d", (len(request.prompt) - 1, *last_two, *sampling, 0.0))
        self.forced: deque[int] = deque()  # tool output to insert next
        self.completion = Completion()
        self.drafter = Drafter(request.prompt) if max_drafted else None

    @cached_property
    def uniforms(self) -> list[float]:
        """A random number for each token of the completion, and zeros for drafts that reach behind its end."""
        return random_uniforms(self.request.seed, self.limit).tolist() + [0.0] * self.max_drafted

    def read(self, draft: list[int]) -> list[StepToken]:
        """What the next step reads: the last token and a draft of those after it."""
        index = len(self.completion.tokens)
        self.next_read[-1] = self.uniforms[index]
        read = [self.next_read]
        if not draft:
            return read
        for i, token in enumerate(draft, 1):
            position, _, previous, *sampling, _ = read[-1]
            read.append(array("d", (position + 1, previous, token, *sampling, self.uniforms[index + i])))
        return read

    def accept(self, sampled: int, logprob: float, stop_tokens: set[int]) -> int | None:
        """
        Adds the sampled token, or instead of it the next forced one, and returns it; None for an end token. Sets
        `completion.finish` if the completion ends with it.
        """
        completion = self.completion
        is_sampled = not self.forced
        token = sampled if is_sampled else self.forced.popleft()
        if self.request.logprobs:
            completion.logprobs.append(logprob if is_sampled else 0.0)
        if is_sampled and token in stop_tokens:
            completion.finish, completion.end_token = "stop", token
            return None
        completion.tokens.append(token)
        completion.sampled.append(is_sampled)
        read = self.next_read
        read[0] += 1
        read[1] = read[2]
        read[2] = token
        if self.drafter:
            self.drafter.add(token)
        if is_sampled:
            self.forced.extend(self.tools.observe(token))
        if len(completion.tokens) >= self.limit:
            completion.finish = self.limit_reason
        return token

    def draft(self) -> list[int]:
        """Up to max_drafted tokens that probably come next; forced ones are certain."""
        if not self.drafter:
            return []
        count = min(self.max_drafted, self.limit - len(self.completion.tokens) - 1)
        return list(islice(self.forced, count)) or self.drafter.draft(count)


def sampling_params(request: Request, vocab_size: int) -> SamplingParams:
    """
    Converts the parameters for the decoder: rounds them to float32, and removes a top_k that excludes nothing. Without
    rounding, host and device could disagree on which rows are limited. Example: a top_p of 1 - 1e-12 is a limit on the
    host, but in float32 on the device it is 1, no limit, and no branch of `sample` would sample that row.
    """
    temperature, top_p = torch.tensor([request.temperature, request.top_p], dtype=torch.float32).tolist()
    if request.temperature > 0:
        temperature = max(temperature, MIN_TEMPERATURE)
    top_k = request.top_k if request.top_k < vocab_size else 0
    return SamplingParams(temperature, top_k, top_p, request.logprobs)


def random_uniforms(seed: int, count: int) -> torch.Tensor:
    """
    Random numbers in [0, 1), multiples of 2^-24, from a seed of 64 bits. Negative seeds are taken modulo 2^64.

    torch's generator on the CPU uses only the lower 32 bits of a seed, so larger seeds use Python's generator.
    """
    seed %= 2**64
    if seed < 2**32:
        return torch.rand(count, generator=torch.Generator().manual_seed(seed))
    generator = random.Random(seed)
    return torch.tensor([generator.getrandbits(24) for _ in range(count)]) / 2**24
