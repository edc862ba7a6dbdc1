"""
The chat in the browser, and an API that OpenAI's clients speak.

    python -m scripts.chat_web                                          # the newest fine-tuned model, at 127.0.0.1:8000
    python -m scripts.chat_web -i sft,rl -t 0.8                         # two models to choose from
    NANOCHAT_API_KEY=… python -m scripts.chat_web --host 0.0.0.0        # for others too

Ctrl-C lets running answers end; a second one does not.
"""

import asyncio
import ipaddress
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from urllib.parse import urlsplit

import torch
import uvicorn

from nanochat import checkpoint_manager, hardware
from nanochat.checkpoint_manager import STAGES
from nanochat.cli import command, flag
from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.serve.app import Defaults, create_app
from nanochat.serve.http import Connection
from nanochat.serve.openai import MAX_TEMPERATURE, MAX_TOKENS, MAX_TOP_K
from nanochat.serve.scheduler import Model, Service, Stream
from nanochat.tokenizer import Tokenizer, default_dir

READ_SECONDS = 60  # that a client may leave what it is sent unread; arbitrary


@dataclass(frozen=True)
class Flags:
    source: str = flag("sft", f"stage of the model, of {', '.join(STAGES)}; several: sft,rl", short="-i")
    model_tag: str = flag("", "name of the checkpoints; default the one written last", short="-g")
    step: int = flag(-1, "step of the checkpoint; -1 = the newest", short="-s")
    temperature: float = flag(0.6, "of sampling where a request does not say; 0 = greedy", short="-t")
    top_k: int = flag(50, "sample among the k likeliest tokens; 0 = among all", short="-k")
    max_tokens: int = flag(512, "tokens of an answer", short="-m")
    device: str = flag("auto", "cuda (all GPUs) | mps | cpu | auto")
    host: str = flag("127.0.0.1", "address to listen at; 0.0.0.0 = all of this machine's")
    port: int = flag(8000, "port to listen at")
    num_rows: int = flag(32, "answers at a time, per device")
    queue: int = flag(128, "answers that may wait, per model")
    api_key: str = flag("", "that clients must send; better in $NANOCHAT_API_KEY, where others do not see it")
    cors_origin: str = flag("", "web sites that may use the API from a browser, with commas; * = all")
    shutdown_seconds: float = flag(30.0, "that running answers have to end")
    log_text: bool = flag(False, "write questions and answers to the log")


@command
def main(flags: Flags) -> None:
    api_key = flags.api_key or os.environ.get("NANOCHAT_API_KEY", "")
    origins = [origin.strip() for origin in flags.cors_origin.split(",") if origin.strip()]
    check(flags, api_key, origins)
    listener = listen(flags.host, flags.port)
    device = hardware.pick_device(flags.device)
    num_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    devices = [torch.device("cuda", i) for i in range(num_gpus)] or [device]
    service = Service(load_models(flags, devices), lambda stream: print(line(stream, flags.log_text), flush=True))
    is_private = is_loopback(flags.host) and not api_key and "*" not in origins
    hosts = ["localhost", *(urlsplit(origin).hostname or "" for origin in origins)] if is_private else []
    app = create_app(service, Defaults(flags.temperature, flags.top_k, flags.max_tokens), api_key, origins, hosts)
    host = f"[{flags.host}]" if ":" in flags.host else flags.host  # IPv6
    address = f"http://{host}:{listener.getsockname()[1]}"
    print(f"{address}, {len(devices)} x {hardware.describe(devices[0])}. Ctrl-C ends.", flush=True)
    if not api_key and not is_loopback(flags.host):
        print("warning: whoever reaches this address may use the model: set NANOCHAT_API_KEY", flush=True)
    config = uvicorn.Config(
        app, http=Connection, ws="none", access_log=False, log_level="warning", server_header=False,
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    Server(config, service, flags.shutdown_seconds).run([listener])


def check(flags: Flags, api_key: str, origins: list[str]) -> None:
    """UserError for flags that make no sense."""
    is_within = 0 <= flags.temperature <= MAX_TEMPERATURE and 0 <= flags.top_k <= MAX_TOP_K
    if not is_within or not 1 <= flags.max_tokens <= MAX_TOKENS:
        limits = f"--temperature must be 0 to {MAX_TEMPERATURE:g}, --top-k 0 to {MAX_TOP_K}"
        raise UserError(f"{limits}, --max-tokens 1 to {MAX_TOKENS}")
    if not all("!" <= character <= "~" for character in api_key):
        raise UserError("the API key must be of ASCII letters, digits and signs, for browsers to send it")
    if not all(origin == "*" or ("://" in origin and origin.count("/") == 2) for origin in origins):
        raise UserError(f"--cors-origin {flags.cors_origin}: name sites as https://chat.example, without a path, or *")
    if flags.num_rows < 1 or flags.queue < 0 or not flags.shutdown_seconds >= 0:
        raise UserError("--num-rows must be at least 1, --queue and --shutdown-seconds at least 0")
    if not 0 <= flags.port < 65536:
        raise UserError("--port must be 1 to 65535, or 0 for any that is free")
    stages = flags.source.split(",")
    if len(set(stages)) < len(stages):
        raise UserError(f"-i {flags.source}: name each stage once")


def listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections. UserError if the address is not ours, or is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # also just after another server
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # who takes nothing in for so long is gone
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, READ_SECONDS * 1000)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        reason = f"{host} port {port} cannot be listened at ({error.strerror})"
        raise UserError(f"{reason}: stop what does, or choose another --host or --port") from error
    return listener


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load_models(flags: Flags, devices: list[torch.device]) -> dict[str, Model]:
    """By stage. UserError for what cannot be loaded."""
    tokenizer = Tokenizer.load(default_dir())
    stages = flags.source.split(",")
    for stage in stages:  # before any is loaded
        checkpoint_manager.find(stage, flags.model_tag, flags.step)
    models = {}
    for stage in stages:
        makers = []
        for device in devices:
            model, checkpoint = checkpoint_manager.load_model(
                stage, flags.model_tag, flags.step, tokenizer, device, hardware.pick_dtype(device)
            )
            makers.append(engine_maker(model, tokenizer, flags.num_rows))
        print(f"{stage}: {checkpoint.path}", flush=True)
        models[stage] = Model(tokenizer, model.config, makers, flags.queue, checkpoint.path.stat().st_mtime)
    return models


def engine_maker(model: GPT, tokenizer: Tokenizer, num_rows: int) -> Callable[[], Engine]:
    def make() -> Engine:
        if model.device.type == "cuda":
            torch.cuda.set_device(model.device)  # of this thread: captured graphs run on the current one
        return Engine(model, tokenizer, num_rows)

    return make


def line(stream: Stream, with_text: bool) -> str:
    """An answered call, for the log."""
    now = time.perf_counter()
    said = sum(len(job.tokens) for job in stream.jobs)
    ends = ",".join(job.finish for job in stream.jobs)
    first = f"first after {stream.first - stream.start:.2f} s, " if stream.first else ""
    client = stream.client.encode("unicode_escape").decode()  # a proxy, or who acts as one, may say anything
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {client} {stream.model} "
    text += f"{len(stream.jobs[0].request.prompt)} → {said} tokens, {first}{now - stream.start:.2f} s, {ends}"
    if with_text:
        decode = stream.service.models[stream.model].tokenizer.decode
        texts = [decode(stream.jobs[0].request.prompt), *(decode(job.tokens) for job in stream.jobs)]
        text += "".join(f"\n  {text!r}" for text in texts)
    return text


class Server(uvicorn.Server):
    """Ends in two steps: the first signal lets answers end, the second does not."""

    def __init__(self, config: uvicorn.Config, service: Service, seconds: float):
        super().__init__(config)
        self.service, self.seconds = service, seconds
        self.stopping: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.is_stopping:
            self.service.deadline = 0
        else:
            self.service.is_stopping = True
            self.loop.call_soon_threadsafe(self._begin_to_stop)

    def _begin_to_stop(self) -> None:
        print("stopping: answers under way may end; again to stop at once", flush=True)
        self.stopping = self.loop.create_task(self._stop())

    async def _stop(self) -> None:
        await self.service.stop(self.seconds)
        self.should_exit = True


if __name__ == "__main__":
    main()
