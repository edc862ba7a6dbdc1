"""
Reinforcement learning on questions with right answers (GRPO, see nanochat/rollout.py).

    python -m scripts.chat_rl                                           # GSM8K, from the SFT model
    python -m scripts.chat_rl --task hardsums --max-new-tokens 64       # the primer's, for a small model
    python -m scripts.chat_rl --updates-per-batch 2 --clip-ratio 0.2 --kl-coef 0.01
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl

The answers to the first question of every batch are kept in <base>/report/transcripts/chat_rl-<tag>.jsonl.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

from nanochat import checkpoint_manager, distributed, hardware, rollout
from nanochat.cli import command, flag
from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.logging import append_after, check_wandb, report_dir
from nanochat.recipe import rl_schedule
from nanochat.rollout import PolicyLoss, Rollout, Sampling
from nanochat.run import prepare, settings_of
from nanochat.tokenizer import Tokenizer, default_dir
from nanochat.train import Hook, TrainState
from tasks.common import Task, limited
from tasks.gsm8k import GSM8K
from tasks.quiz import HardSums, Sums
from tasks.spelling import SpellingBee

TASKS: dict[str, Callable[[str], Task]] = {  # split → a task with a reward
    "gsm8k": GSM8K,
    "sums": Sums,
    "hardsums": HardSums,
    "spellingbee": SpellingBee,
}


@dataclass(frozen=True)
class Flags:
    source: str = flag("sft", "stage to start from", short="-i", choices=("base", "mid", "sft", "rl"))
    base_tag: str = flag("", "name of the checkpoints to start from; default the one written last")
    base_step: int = flag(-1, "step of the checkpoint to start from; -1 = the newest")
    model_tag: str = flag("", "name of the checkpoints; default that of the ones it starts from")
    task: str = flag("gsm8k", "questions to learn from", choices=tuple(TASKS))
    num_epochs: int = flag(1, "times through the task's training questions")
    num_iterations: int = flag(-1, "optimizer updates; -1 = as the epochs have")
    examples_per_step: int = flag(16, "questions per batch of rollouts, over all ranks")
    num_samples: int = flag(16, "answers sampled per question")
    max_new_tokens: int = flag(256, "tokens of an answer at most")
    temperature: float = flag(1.0, "of sampling")
    top_k: int = flag(50, "sample among the k likeliest tokens; 0 = among all")
    rollout_batch_size: int = flag(256, "answers sampled at a time per rank")
    device_batch_size: int = flag(16, "answers per forward and backward pass and rank")
    init_lr_frac: float = flag(0.05, "learning rates at the start, as a share of the base's")
    updates_per_batch: int = flag(1, "optimizer updates on each batch of rollouts; several need --clip-ratio")
    clip_ratio: float = flag(0.0, "PPO's clipping of the probability ratio, such as 0.2; 0 = no ratio")
    kl_coef: float = flag(0.0, "weight of the KL divergence from the model that the run starts from; 0 = none")
    eval_every: int = flag(60, "updates between evaluations on test questions; 0 = only first and last, -1 = never")
    eval_examples: int = flag(400, "test questions to evaluate on")
    eval_samples: int = flag(8, "answers per test question: pass@1, pass@2, pass@4 … up to this")
    save_every: int = flag(60, "updates between checkpoints besides the last; -1 = none")
    keep_last: int = flag(-1, "checkpoints to keep; -1 = all")
    resume: bool = flag(False, "continue from the newest intact checkpoint of this tag, if there is one")
    device: str = flag("auto", "cuda | mps | cpu | auto")
    run: str = flag("", "wandb run name; empty = console and metrics file only")


@command
def main(flags: Flags) -> None:
    check(flags)
    with distributed.init(flags.device) as dist:
        # check
        check_wandb(flags.run)
        tokenizer = Tokenizer.load(default_dir())
        source = checkpoint_manager.find(flags.source, flags.base_tag, flags.base_step)
        tag = flags.model_tag or source.tag
        if (flags.source, tag) == ("rl", source.tag):
            raise UserError(f"the run would take the place of {source.path}, which it starts from: give --model-tag")
        start = prepare("rl", tag, source, tokenizer, dist, flags.resume, flags.keep_last)
        begun_from = start.saved.meta["base"] if start.saved else str(source.path)
        reference = checkpoint_manager.at(begun_from) if flags.kl_coef else None
        questions, test_questions, too_long = read_questions(flags, tokenizer, source.config.sequence_len)
        epochs = max(1, flags.num_epochs * len(questions) // flags.examples_per_step) * flags.updates_per_batch
        num_steps = flags.num_iterations if flags.num_iterations > 0 else epochs

        # build
        # Before the run is restored with its random generators, as making a model draws from them.
        reference_model = reference.build_model(dist.device, start.dtype) if reference else None
        settings = settings_of(start.saved or source)
        config = {"flags": asdict(flags), "base": begun_from, "settings": asdict(settings)}
        rates = settings.rates(flags.init_lr_frac)
        run = start.build(rates, settings.batch_factor, config, compile=False)  # no two batches have one shape
        with_ratio = flags.clip_ratio > 0
        sampling = Sampling(flags.num_samples, flags.max_new_tokens, flags.temperature, flags.top_k, with_ratio)
        eval_sampling = replace(sampling, num_samples=flags.eval_samples, logprobs=False)
        loss_fn = PolicyLoss(sampling, flags.clip_ratio, flags.kl_coef, reference_model)
        engine = Engine(run.model, tokenizer, flags.rollout_batch_size)
        logger = run.logger(flags.run, num_steps)
        transcripts = report_dir() / "transcripts" / f"chat_rl-{tag}.jsonl"
        file = append_after(run.state.step, transcripts) if dist.is_main else None
        dist.print0(
            f"{tag} from {begun_from}: {len(questions)} questions of {flags.task}, {len(test_questions)} to test on "
            f"({too_long} too long), {num_steps} updates, {flags.examples_per_step} x {flags.num_samples} answers; "
            f"{hardware.describe(dist.device)}, {start.dtype}"
        )

        # run
        def draw(first: int, step: int) -> list[Rollout]:
            engine.refresh_weights()
            numbers = range(first, first + flags.examples_per_step)
            batch = [questions[number % len(questions)] for number in numbers]
            rollouts = rollout.sample(engine, batch, numbers, sampling, dist)
            if file:
                file.writelines(transcript(r, step, tokenizer) for r in rollouts[: flags.num_samples])
                file.flush()
            return rollouts

        def evaluate(state: TrainState) -> dict[str, float]:
            engine.refresh_weights()
            return rollout.evaluate(engine, test_questions, eval_sampling, dist)

        if flags.eval_every >= 0 and run.state.step == 0:
            logger.log(run.state, evaluate(run.state))
        pack = partial(rollout.pack, device_batch_size=flags.device_batch_size, dist=dist, with_all=flags.kl_coef > 0)
        data_state = (run.data_states or [None])[0]
        steps = rollout.rollout_steps(
            draw, pack, flags.examples_per_step, flags.updates_per_batch, num_steps, dist, data_state
        )
        hooks = [Hook(flags.eval_every, evaluate), run.save_hook(flags.save_every)]
        state = run.train(steps, loss_fn, rl_schedule, hooks, logger)

        # report
        numbers = {"questions": len(questions), "too long": too_long, "transcripts": str(transcripts)}
        logger.finish(state, model=start.checkpoints.good, **numbers)


def check(flags: Flags) -> None:
    """UserError for flags that make no sense, alone or together."""
    for name in (
        "num_epochs", "examples_per_step", "max_new_tokens", "rollout_batch_size", "device_batch_size",
        "updates_per_batch", "eval_examples", "eval_samples",
    ):  # fmt: skip
        if getattr(flags, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(flags, name)}: must be at least 1")
    if flags.num_iterations < 1 and flags.num_iterations != -1:
        raise UserError(f"--num-iterations {flags.num_iterations}: must be at least 1, or -1 to follow from the epochs")
    if flags.num_samples < 2:
        raise UserError(f"--num-samples {flags.num_samples}: answers are compared with each other, so at least 2")
    if not 0 < flags.temperature < math.inf or flags.top_k < 0 or flags.top_k == 1:
        raise UserError(
            "answers that are all alike teach nothing: --temperature above 0, --top-k at least 2, or 0 = all"
        )
    if not (0 <= flags.clip_ratio < 1 and 0 <= flags.kl_coef < math.inf and 0 < flags.init_lr_frac < math.inf):
        raise UserError("--clip-ratio must be in [0, 1), --kl-coef at least 0, --init-lr-frac above 0")
    if flags.updates_per_batch > 1 and not flags.clip_ratio:
        raise UserError("several updates on a batch need a bound on how far they go: give --clip-ratio, such as 0.2")


def read_questions(
    flags: Flags, tokenizer: Tokenizer, context: int
) -> tuple[list[rollout.Question], list[rollout.Question], int]:
    """To train on, as many as the run takes, and to test on; and how many were left out as too long."""
    room = context - flags.max_new_tokens
    num_batches = math.ceil(flags.num_iterations / flags.updates_per_batch)
    needed = num_batches * flags.examples_per_step if flags.num_iterations > 0 else math.inf
    questions, too_long = rollout.questions_of(TASKS[flags.task]("train"), tokenizer, room, needed)
    if flags.eval_every < 0:
        return questions, [], too_long
    test = limited(TASKS[flags.task]("test"), flags.eval_examples)
    test_questions, test_too_long = rollout.questions_of(test, tokenizer, room)
    return questions, test_questions, too_long + test_too_long


def transcript(r: Rollout, step: int, tokenizer: Tokenizer) -> str:
    """A line of JSON for a person to read."""
    said = {"prompt": tokenizer.decode(r.prompt), "answer": tokenizer.decode(r.answer)}
    return json.dumps({"step": step} | said | {"reward": r.reward, "advantage": r.advantage}) + "\n"


if __name__ == "__main__":
    main()
