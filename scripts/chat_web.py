"""
Serves a chat model: a page for the browser and an API for OpenAI's clients.

    python -m scripts.chat_web                                          # the newest SFT model at http://127.0.0.1:8000
    python -m scripts.chat_web -i sft,rl -t 0.8                         # two models to choose from
    python -m scripts.chat_web -i sft/d12,sft/d20                       # two models of one stage
    NANOCHAT_API_KEY=… python -m scripts.chat_web --host 0.0.0.0        # listen on all interfaces

The first Ctrl-C lets running completions finish, the second one stops at once.
"""

import asyncio
import ipaddress
import os
import socket
import time
from dataclasses import dataclass
from functools import partial
from types import FrameType
from urllib.parse import urlsplit

import torch
import uvicorn

from nanochat import checkpoint_manager, hardware, planner
from nanochat.checkpoint_manager import STAGES
from nanochat.cli import COUNT, NOT_NEGATIVE, STEP, Range, command, flag
from nanochat.common import UserError
from nanochat.costs import generation_memory
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.logging import print_table
from nanochat.request import Request
from nanochat.serve.api import MAX_TEMPERATURE, MAX_TOKENS, MAX_TOP_K
from nanochat.serve.app import Connection, create_app
from nanochat.serve.scheduler import ResponseHandle, ServedModel, Service
from nanochat.step_forward import can_compile
from nanochat.tokenizer import Tokenizer

READ_SECONDS = 60  # a client that reads nothing for this long is disconnected; heuristic, not tuned


@dataclass(frozen=True)
class Flags:
    source: str = flag("sft", f"stage of the model: {', '.join(STAGES)}; several: sft,rl or sft/TAG,rl", short="-i")
    model_tag: str = flag(
        "", "name of the checkpoints, for stages without /TAG; default: the one saved last", short="-g"
    )
    step: int = flag(-1, "step of the checkpoint; -1 = the newest", STEP, short="-s")
    temperature: float = flag(
        0.6, "sampling temperature of requests that set none; 0 = greedy", Range(0, MAX_TEMPERATURE), short="-t"
    )
    top_k: int = flag(
        50, "sample from the k most likely tokens, for requests that set none; 0 = all", Range(0, MAX_TOP_K), short="-k"
    )
    max_tokens: int = flag(
        512, "maximum new tokens per completion, for requests that set none", Range(1, MAX_TOKENS), short="-m"
    )
    device: str = flag("auto", "cuda (all GPUs) | mps | cpu | auto")
    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 = all interfaces")
    port: int = flag(8000, "port to listen on; 0 = any free one", Range(0, 65535))
    num_rows: int = flag(32, "slots per engine: completions that each device generates at a time", COUNT)
    compile: bool = flag(True, "compile the decode step at the start, if the machine can")
    queue: int = flag(128, "completions that may wait, per model", NOT_NEGATIVE)
    api_key: str = flag("", "key that clients must send; $NANOCHAT_API_KEY keeps it out of the process list")
    cors_origin: str = flag("", "web sites whose pages may use the API, separated by commas; * = all")
    shutdown_seconds: float = flag(30.0, "time limit for running completions at shutdown, in seconds", NOT_NEGATIVE)
    log_text: bool = flag(False, "log prompts and completions")
    plan: bool = flag(False, "print the memory that the models need and exit, without loading them")
    for_: str = flag("", "with --plan: another machine to plan for, such as 1xRTX4090")


@command
def main(flags: Flags) -> None:
    api_key = flags.api_key or os.environ.get("NANOCHAT_API_KEY", "")
    origins = [origin.strip() for origin in flags.cors_origin.split(",") if origin.strip()]
    check(flags, api_key, origins)
    if flags.plan:
        print_plan(flags)
        return
    listener = listen(flags.host, flags.port)
    device = hardware.pick_device(flags.device)
    devices = [device]
    if device.type == "cuda":
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]

    models = load_models(flags, devices)
    service = Service(models, log=lambda handle: print(log_line(handle, flags.log_text), flush=True))
    defaults = Request([], flags.max_tokens, flags.temperature, flags.top_k)
    hosts = allowed_hosts(flags.host, api_key, origins)
    app = create_app(service, defaults, api_key=api_key, origins=origins, hosts=hosts)
    config = uvicorn.Config(
        app, http=Connection, ws="none", log_level="warning", server_header=False, timeout_graceful_shutdown=1
    )
    host = f"[{flags.host}]" if ":" in flags.host else flags.host  # IPv6
    url = f"http://{host}:{listener.getsockname()[1]}"
    if not api_key and not is_loopback(flags.host):
        print("warning: anyone who can reach this address can use the model: set NANOCHAT_API_KEY", flush=True)
    greeting = f"{url}, {len(devices)} x {hardware.describe(devices[0])}. Press Ctrl-C to stop."
    Server(config, service, flags.shutdown_seconds, greeting).run([listener])


def print_plan(flags: Flags) -> None:
    """Prints the memory that each model needs on each device when the context of all rows is full."""
    target = planner.find_target(flags.for_, flags.device)
    dtype = target.dtype if flags.for_ else hardware.pick_dtype(hardware.pick_device(flags.device))
    for stage, tag in sources(flags).values():
        checkpoint = checkpoint_manager.find(stage, tag, flags.step)
        config = checkpoint.config
        memory = generation_memory(
            config, flags.num_rows, config.sequence_len, dtype, target.device, compiled=flags.compile
        )
        rows = [("machine", target.name, f"each device has {planner.gib(target.memory)} to use, for all models")]
        rows.append(("rows", str(flags.num_rows), f"completions at a time, up to {config.sequence_len} tokens each"))
        print_table(f"Plan of {checkpoint.path}", rows + planner.memory_rows(memory, target))


# ---- flags ----


def check(flags: Flags, api_key: str, origins: list[str]) -> None:
    """Raises UserError for an API key, origins or models that are not valid."""
    if not all("!" <= character <= "~" for character in api_key):
        raise UserError("the API key may have only ASCII letters, digits and punctuation: browsers send no others")
    if not all(origin == "*" or ("://" in origin and origin.count("/") == 2) for origin in origins):
        raise UserError(f"--cors-origin {flags.cors_origin}: write sites as https://chat.example, without a path, or *")
    if len(sources(flags)) < len(flags.source.split(",")):
        raise UserError(f"-i {flags.source}: name each model only once")


def sources(flags: Flags) -> dict[str, tuple[str, str]]:
    """Public name → stage and tag of each model. The public name is the stage, with /TAG if it was given."""
    models = {}
    for name in flags.source.split(","):
        stage, _, tag = name.partition("/")
        models[name] = (stage, tag or flags.model_tag)
    return models


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def allowed_hosts(host: str, api_key: str, origins: list[str]) -> list[str]:
    """Names allowed in the Host header, for RequestGuard; none = any, where a key protects or others are welcome."""
    if api_key or "*" in origins or not is_loopback(host):
        return []
    return ["localhost", *(urlsplit(origin).hostname or "" for origin in origins)]


# ---- socket, models, log ----


def listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket. Raises UserError if the address is taken or not one of this machine's."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        dual_stack = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # then "::" is all of IPv4 too
        listener = socket.create_server(address, family=family, backlog=2048, dualstack_ipv6=dual_stack)
    except OSError as error:
        remedy = "stop the program that uses it, or choose another --host or --port"
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror}; {remedy}") from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, READ_SECONDS * 1000)
    return listener


def load_models(flags: Flags, devices: list[torch.device]) -> list[ServedModel]:
    """Loads each model onto each device. Raises UserError for a checkpoint that cannot be loaded."""
    for stage, tag in sources(flags).values():
        checkpoint_manager.find(stage, tag, flags.step)  # report a missing one before loading any
    models = []
    for name, (stage, tag) in sources(flags).items():
        engine_makers = []
        for device in devices:
            model, tokenizer, checkpoint = checkpoint_manager.load_model(
                stage, tag, flags.step, device, hardware.pick_dtype(device)
            )
            engine_makers.append(partial(make_engine, model, tokenizer, flags.num_rows, flags.compile))
        print(f"{name}: {checkpoint.path}", flush=True)
        if flags.compile and can_compile(model):
            print("  compiles its decode step: up to a minute the first time; --no-compile skips it", flush=True)
        created = checkpoint.path.stat().st_mtime
        models.append(ServedModel(name, tokenizer, model.config, engine_makers, flags.queue, created))
    return models


def make_engine(model: GPT, tokenizer: Tokenizer, max_slots: int, compile: bool = False) -> Engine:
    """Must be called in the thread that runs the engine."""
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)  # per thread: CUDA graphs run on the thread's current device
    # On a CPU in float32, so that a completion does not depend on the other requests.
    return Engine(model, tokenizer, max_slots, compile=compile)


def log_line(handle: ResponseHandle, with_text: bool) -> str:
    """Returns the log line of a response that has ended; with_text adds the prompt and the completions."""
    seconds = time.perf_counter() - handle.start_time
    client = handle.client.encode("unicode_escape").decode()  # a proxy may send any text, also control characters
    prompt = handle.generations[0].request.prompt
    completions = [generation.tokens for generation in handle.generations]
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {client} {handle.model.name} "
    line += f"{len(prompt)} → {sum(map(len, completions))} tokens, "
    if handle.first_token_time:
        line += f"first after {handle.first_token_time - handle.start_time:.2f} s, "
    line += f"{seconds:.2f} s, {','.join(generation.finish for generation in handle.generations)}"
    if with_text:
        for ids in [prompt, *completions]:
            line += f"\n  {handle.model.tokenizer.decode(ids)!r}"
    return line


class Server(uvicorn.Server):
    """
    A uvicorn server that prints a greeting when all models are ready. Its first signal lets running completions finish,
    and its second one cancels them.
    """

    def __init__(self, config: uvicorn.Config, service: Service, shutdown_seconds: float, greeting: str):
        super().__init__(config)
        self.service = service
        self.shutdown_seconds = shutdown_seconds
        self.greeting = greeting

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.greeting_task = asyncio.create_task(self._greet())  # kept, like shutdown_task below
        await super().serve(sockets)

    async def _greet(self) -> None:
        """Prints the address when requests to it succeed, not while they get 503."""
        while not self.started or self.service.status == "loading":
            await asyncio.sleep(0.02)
        if self.service.status == "ok":
            print(self.greeting, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.is_stopping:
            self.service.deadline = 0
        else:
            self.service.is_stopping = True
            # Kept, because the loop has only a weak reference to the task.
            self.shutdown_task = asyncio.run_coroutine_threadsafe(self._shut_down(), self.loop)

    async def _shut_down(self) -> None:
        print("stopping after the running completions; press Ctrl-C again to stop at once", flush=True)
        await self.service.stop(self.shutdown_seconds)
        self.should_exit = True


if __name__ == "__main__":
    main()
