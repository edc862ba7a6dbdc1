r"""
Write conversations that give a model a name and a character, from a short YAML file of facts about it.

    python -m scripts.make_identity kari.yaml --out identity.jsonl
    python -m scripts.chat_sft --identity-file identity.jsonl --identity-epochs 3

    # the same for a small model, such as the one that speedrun.sh trains without a GPU
    python -m scripts.chat_sft --identity-file identity.jsonl --identity-epochs 3 --primer-epochs 3 \
        --smoltalk-epochs 0 --mmlu-epochs 0 --gsm8k-epochs 0 --simplespelling-epochs 0 --spellingbee-epochs 0

    # the replies are written by another model, behind any OpenAI-compatible endpoint; the key is $OPENAI_API_KEY
    python -m scripts.make_identity kari.yaml --out identity.jsonl --endpoint http://127.0.0.1:8000/v1

scripts/samples/identity.yaml shows all facts that the file can have; only the name is needed. Without an endpoint the
questions and replies are filled in from wordings (nanochat/primer/identity.txt). With one, the questions are the same,
and the other model writes each reply knowing the facts; a reply without the fact that was asked for is replaced by a
wording.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from nanochat import primer
from nanochat.cli import POSITIVE, SEED, Range, command, flag
from nanochat.common import UserError, atomic_path
from nanochat.conversation import turns
from nanochat.primer.identity import MAX_CONVERSATIONS, Exchange, Identity, generate_identity, read_identity

ATTEMPTS = 3  # per request
RETRY_SECONDS = 2.0  # before the second attempt; twice as long before each further one
MAX_RETRY_SECONDS = 60.0  # of the server's Retry-After
CONCURRENCY = 4  # requests at a time (heuristic): our own web chat takes more from one client only in its queue
MAX_REPLY_TOKENS = 100
MAX_REPLY_CHARACTERS = 600  # longer replies are replaced: a small model cannot learn them, and contexts are short


@dataclass(frozen=True)
class Flags:
    facts: list[str] = flag(MISSING, "YAML file of facts, such as scripts/samples/identity.yaml")
    out: str = flag("identity.jsonl", "file for the conversations, one array of messages per line")
    num: int = flag(600, "conversations to write", Range(1, MAX_CONVERSATIONS))
    seed: int = flag(0, "seed for the choice of questions and wordings", SEED)
    endpoint: str = flag("", "base URL of an OpenAI-compatible API that writes the replies; empty = wordings")
    model: str = flag("", "with --endpoint: name of the model; default: the only one that the endpoint lists")
    timeout: float = flag(60.0, "with --endpoint: seconds to wait for a response", POSITIVE)


@command
def main(flags: Flags) -> None:
    if len(flags.facts) != 1:
        raise UserError("give one YAML file of facts")
    identity = read_identity(Path(flags.facts[0]))
    conversations = generate_identity(identity, flags.num, flags.seed)
    if flags.endpoint:
        client = ChatClient(flags.endpoint, flags.model, flags.timeout)
        conversations = write_replies(client, identity, conversations, flags.seed)
    out = Path(flags.out)
    with atomic_path(out) as temporary:
        lines = [json.dumps(messages(exchanges), ensure_ascii=False) + "\n" for exchanges in conversations]
        temporary.write_text("".join(lines), encoding="utf-8")
    print(f"{out}: {len(conversations)} conversations of {identity.name}")
    print(f"  python -m scripts.chat_sft --identity-file {out} --identity-epochs 3")


def messages(exchanges: list[Exchange]) -> list[dict[str, Any]]:
    contents: list[Any] = []
    for exchange in exchanges:
        contents += [exchange.question, exchange.reply]
    return turns(*contents)


# ---- replies of another model ----


class ChatClient:
    """A client of the chat completions of one model. Its methods raise UserError if the endpoint does not work."""

    def __init__(self, endpoint: str, model: str, timeout: float):
        if not endpoint.startswith(("http://", "https://")):
            raise UserError(f"--endpoint {endpoint}: write a URL such as http://127.0.0.1:8000/v1")
        self.endpoint = endpoint.rstrip("/")
        self.timeout = timeout
        self.model = model or self._only_model()

    def complete(self, conversation: list[dict[str, Any]], seed: int) -> str:
        """Returns the next reply."""
        options = {"model": self.model, "max_tokens": MAX_REPLY_TOKENS, "temperature": 0.8, "seed": seed}
        response = self._request("/chat/completions", {"messages": conversation} | options)
        try:
            return response["choices"][0]["message"]["content"] or ""
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{self.endpoint} sent no chat completion: is it an OpenAI-compatible API?") from error

    def _only_model(self) -> str:
        response = self._request("/models")
        try:
            names = [model["id"] for model in response["data"]]
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.endpoint} lists no models: add --model NAME") from error
        if len(names) != 1:
            raise UserError(f"{self.endpoint} has {len(names)} models: add --model with one of {', '.join(names[:20])}")
        return names[0]

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Sends a request, up to ATTEMPTS times if the server is busy or does not answer; returns the JSON."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = json.dumps(body).encode() if body else None
        wait = RETRY_SECONDS
        for attempt in range(1, ATTEMPTS + 1):
            request = urllib.request.Request(self.endpoint + path, data, headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                problem = f"HTTP status {error.code}: {error.read(300).decode(errors='replace')}"
                if error.code != 429 and error.code < 500:
                    remedy = "check --endpoint, --model and $OPENAI_API_KEY"
                    raise UserError(f"{request.full_url} refused the request ({problem}): {remedy}") from error
                wait = max(wait, _retry_after(error))
            except ValueError as error:
                raise UserError(f"{request.full_url} sent no JSON: is it an OpenAI-compatible API?") from error
            except (OSError, http.client.HTTPException) as error:  # refused, timed out, closed too early
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < ATTEMPTS:
                time.sleep(wait)
                wait *= 2
        remedy = "start the server, check --endpoint, or give it more time with --timeout"
        raise UserError(f"{self.endpoint}{path} did not answer {ATTEMPTS} times ({problem}): {remedy}")


def _retry_after(error: urllib.error.HTTPError) -> float:
    value = error.headers.get("Retry-After", "")
    return min(float(value), MAX_RETRY_SECONDS) if value.isdigit() else 0.0


def write_replies(
    client: ChatClient, identity: Identity, conversations: list[list[Exchange]], seed: int
) -> list[list[Exchange]]:
    """Replaces the replies about the model by the client's. Prints how many the client did not get right."""
    system = {"role": "system", "content": instructions(identity)}
    rejected = 0

    def rewrite(number: int) -> tuple[list[Exchange], int]:
        written: list[Exchange] = []
        num_rejected = 0
        for exchange in conversations[number]:
            if not exchange.fixed:
                question = {"role": "user", "content": exchange.question}
                reply = " ".join(client.complete([system, *messages(written), question], seed + number).split())
                if is_usable(reply, exchange.required):
                    exchange = exchange._replace(reply=reply)
                else:
                    num_rejected += 1
            written.append(exchange)
        return written, num_rejected

    results = []
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        try:
            for exchanges, num_rejected in pool.map(rewrite, range(len(conversations))):
                results.append(exchanges)
                rejected += num_rejected
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    total = sum(not exchange.fixed for exchanges in conversations for exchange in exchanges)
    print(f"{client.model} wrote {total - rejected} of {total} replies; the others lacked the fact or were too long")
    return results


def is_usable(reply: str, required: str) -> bool:
    return 0 < len(reply) <= MAX_REPLY_CHARACTERS and primer.contains_phrase(reply, required)


def instructions(identity: Identity) -> str:
    """The system message: the facts, and how to reply."""
    facts = "; ".join(f"{name}: {text}" for name, text in identity.values().items())
    style = f" You sometimes say: {' '.join(identity.catchphrases)}" if identity.catchphrases else ""
    how = "Reply in one or two short sentences, in character."
    return f"You are {identity.name}. Facts about you: {facts}.{style} {how}"


if __name__ == "__main__":
    main()
