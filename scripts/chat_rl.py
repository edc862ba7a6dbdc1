"""
Reinforcement learning on questions whose answers can be graded: GRPO, explained in nanochat/rollout.py.

    python -m scripts.chat_rl                                           # GSM8K, from the SFT model
    python -m scripts.chat_rl --task hardsums --max-new-tokens 48       # the primer's questions, for a small model
    python -m scripts.chat_rl --updates-per-batch 2 --clip-ratio 0.2 --kl-coef 0.01
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl

The completions of the first question of every batch are written to <base>/report/transcripts/chat_rl-<tag>.jsonl.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from nanochat import checkpoint_manager, distributed, hardware, planner, rollout
from nanochat.checkpoint_manager import Checkpoint
from nanochat.cli import (
    COUNT,
    COUNT_OR_DEFAULT,
    INTERVAL,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    STEP,
    Range,
    command,
    flag,
)
from nanochat.common import UserError, human
from nanochat.costs import Memory, TrainingSetup, param_counts, rl_memory
from nanochat.engine import Engine, pays_to_compile, sample_greedily
from nanochat.gpt import GPTConfig
from nanochat.logging import append_after, print_table
from nanochat.planner import Target
from nanochat.recipe import load_hyperparameters, param_groups, rl_schedule
from nanochat.report.record import recorded
from nanochat.rollout import PolicyLoss, Question, Rollout, RolloutConfig, RolloutPlan
from nanochat.run import Run, RunFlags
from nanochat.shared_prompts import pays_to_share
from nanochat.tokenizer import Tokenizer
from nanochat.train import Hook, TrainState
from tasks.common import Task, limited
from tasks.gsm8k import GSM8K
from tasks.quiz import HardSums, Sums
from tasks.spelling import SpellingBee

TASKS: dict[str, Callable[[str], Task]] = {  # each called with a split; the task has a reward
    "gsm8k": GSM8K,
    "sums": Sums,
    "hardsums": HardSums,
    "spellingbee": SpellingBee,
}


NUM_SAMPLES = 3  # test questions whose greedy completions are logged at each evaluation
# If a run does not fit into memory.
REMEDY = "lower --rollout-batch-size or --device-batch-size, or use --activation-checkpointing"


@dataclass(frozen=True)
class Flags(RunFlags):
    source: str = flag("sft", "stage to start from", short="-i", choices=("base", "mid", "sft", "rl"))
    base_tag: str = flag("", "tag of the checkpoint to start from; default: the one written last")
    base_step: int = flag(-1, "step of the checkpoint to start from; -1 = the newest", STEP)
    task: str = flag("gsm8k", "questions to train on", choices=tuple(TASKS))
    num_epochs: int = flag(1, "passes over the task's training questions", COUNT)
    num_iterations: int = flag(-1, "optimizer steps; -1 = as many as the epochs need", COUNT_OR_DEFAULT)
    examples_per_step: int = flag(16, "questions per batch of rollouts, over all ranks", COUNT)
    num_samples: int = flag(16, "completions sampled per question, which are compared with each other", Range(2))
    max_new_tokens: int = flag(256, "maximum tokens of a completion", COUNT)
    temperature: float = flag(1.0, "sampling temperature", POSITIVE)
    top_k: int = flag(50, "sample among the k most likely tokens; 0 = all tokens", NOT_NEGATIVE)
    rollout_batch_size: int = flag(256, "completions sampled at a time per rank", COUNT)
    device_batch_size: int = flag(16, "completions per forward and backward pass and rank", COUNT)
    init_lr_frac: float = flag(0.05, "initial learning rates as a fraction of pretraining's", POSITIVE)
    updates_per_batch: int = flag(1, "optimizer steps on each batch of rollouts; more than 1 needs --clip-ratio", COUNT)
    clip_ratio: float = flag(0.0, "PPO's clipping of the probability ratio, such as 0.2; 0 = no ratio", SHARE)
    kl_coef: float = flag(
        0.0, "weight of the KL divergence from the model that the run starts from; 0 = none", NOT_NEGATIVE
    )
    eval_every: int = flag(60, "optimizer steps between evaluations; 0 = only before and after, -1 = never", INTERVAL)
    eval_examples: int = flag(400, "test questions to evaluate on", COUNT)
    eval_samples: int = flag(8, "completions per test question: pass@1, pass@2, pass@4 … up to this", COUNT)
    save_every: int = flag(
        60, "optimizer steps between checkpoints, besides the last; 0 or -1 = only the last", INTERVAL
    )


@command
@recorded("chat_rl")
def main(flags: Flags) -> None:
    validate_flags(flags)
    if flags.plan:
        print_plan(flags)
        return
    with distributed.init(flags.device) as dist:
        source, tag = find_source(flags)
        with Run.open("rl", tag, source, flags, tokenizer=source.load_tokenizer(), dist=dist) as run:
            train_on_rollouts(flags, run, source)


def train_on_rollouts(flags: Flags, run: Run, source: Checkpoint) -> None:
    """Builds the model, the engine and the loss, and trains until the last step."""
    dist, tokenizer = run.dist, run.tokenizer
    questions, test_questions, num_skipped = load_questions(flags, tokenizer, source.config.sequence_len)
    plan = plan_rollouts(flags, len(questions))

    target = planner.local_target(dist.device, dist.world_size, run.dtype)
    memory = planned_memory(flags, source.config, target)
    planner.check_memory(memory, target, REMEDY)
    run.rows, run.predicted_memory = flags.device_batch_size, memory.peak

    # Build. The model that the run starts from is the reference of the KL term.
    reference = None
    if flags.kl_coef:
        reference = checkpoint_manager.find_by_path(run.parent_checkpoint).build_model(dist.device, run.dtype)
    base = load_hyperparameters((run.resumed or source).meta)
    groups = param_groups(source.config, base, weight_decay=0.0, lr_frac=flags.init_lr_frac)
    metadata = {"base": run.parent_checkpoint, "settings": asdict(base)}
    run.build(groups, metadata, compile=False)  # each new shape would be compiled, and every batch has one
    num_completions = plan.num_steps * flags.examples_per_step * flags.num_samples // dist.world_size
    compile = pays_to_compile(num_completions, flags.max_new_tokens)
    share_prompts = pays_to_share(flags.num_samples, flags.rollout_batch_size, dist.device)
    engine = Engine(run.model, tokenizer, flags.rollout_batch_size, compile=compile, share_prompts=share_prompts)
    logger = run.open_log(plan.num_steps)

    eval_sampling = RolloutConfig(flags.eval_samples, flags.max_new_tokens, flags.temperature, flags.top_k)
    sampling = replace(eval_sampling, num_samples=flags.num_samples, logprobs=flags.clip_ratio > 0)
    loss_fn = PolicyLoss(sampling, flags.clip_ratio, flags.kl_coef, reference)
    transcript_path = run.log_file("transcripts")
    transcripts = append_after(run.state.step, transcript_path) if dist.is_main else None
    dist.print0(
        f"{run.tag} from {run.parent_checkpoint}: {len(questions)} questions of {flags.task}, {len(test_questions)} "
        f"test questions, {num_skipped} skipped (too long), {plan.num_steps} optimizer steps, "
        f"{flags.examples_per_step} x {flags.num_samples} completions; {hardware.describe(dist.device)}"
    )

    # Train.
    def draw(first: int, step: int) -> list[Rollout]:
        engine.refresh_weights()
        numbers = range(first, first + flags.examples_per_step)
        batch = [questions[number % len(questions)] for number in numbers]
        rollouts = rollout.sample_rollouts(engine, batch, numbers, sampling, dist)
        if transcripts:
            transcripts.writelines(transcript(r, step, tokenizer) for r in rollouts[: flags.num_samples])
            transcripts.flush()
        return rollouts

    def evaluate(state: TrainState) -> dict[str, float]:
        engine.refresh_weights()
        scores = rollout.evaluate_pass_at_k(engine, test_questions, eval_sampling, dist)
        if dist.is_main:
            prompts = {tokenizer.decode(question.prompt): question.prompt for question in test_questions[:NUM_SAMPLES]}
            logger.log_samples(state, sample_greedily(engine, prompts, flags.max_new_tokens))
        return scores

    if flags.eval_every >= 0 and run.state.step == 0:
        logger.log(run.state, evaluate(run.state))
    data_state = run.data_states[0] if run.data_states else None
    steps = rollout.rollout_steps(plan, draw, dist, data_state)
    run.train(steps, loss_fn, rl_schedule, [Hook(flags.eval_every, evaluate), run.save_hook()])
    run.finish(**{"questions": len(questions), "too long": num_skipped, "transcripts": str(transcript_path)})


def print_plan(flags: Flags) -> None:
    source, tag = find_source(flags)
    target = planner.find_target(flags.for_, flags.device)
    rollouts = f"{flags.examples_per_step} questions x {flags.num_samples} completions of {flags.max_new_tokens} tokens"
    rows = [
        ("machine", target.name, f"{planner.gib(target.memory)} to use per rank"),
        ("parameters", human(param_counts(source.config)["total"]), str(source.path)),
        ("batch", f"{flags.examples_per_step * flags.num_samples} rollouts", rollouts),
    ]
    memory = planned_memory(flags, source.config, target)
    print_table(f"Plan of {tag}", rows + planner.memory_rows(memory, target))
    planner.check_memory(memory, target, REMEDY)


def planned_memory(flags: Flags, config: GPTConfig, target: Target) -> Memory:
    """Memory of a rank if prompts and completions fill the context."""
    wanted = TrainingSetup(
        flags.device_batch_size, compiled=False, activation_checkpointing=flags.activation_checkpointing
    )
    setup = replace(planner.training_setup(config, target, 0, wanted), accumulation=2)  # or more, as rollouts are many
    return rl_memory(config, setup, flags.rollout_batch_size, config.sequence_len, flags.kl_coef > 0)


def validate_flags(flags: Flags) -> None:
    """UserError for values that do not fit together."""
    if flags.top_k == 1:
        raise UserError("--top-k 1: completions must differ to be compared, use at least 2, or 0 for all tokens")
    if flags.updates_per_batch > 1 and not flags.clip_ratio:
        raise UserError("--updates-per-batch above 1 needs a limit on the change: give --clip-ratio, such as 0.2")


def find_source(flags: Flags) -> tuple[Checkpoint, str]:
    """The checkpoint to start from and the tag of the new ones. UserError if the run would overwrite its source."""
    source = checkpoint_manager.find(flags.source, flags.base_tag, flags.base_step)
    tag = flags.model_tag or source.tag
    if flags.source == "rl" and tag == source.tag:
        raise UserError(f"the run would overwrite {source.path}, which it starts from: give another --model-tag")
    return source, tag


def load_questions(flags: Flags, tokenizer: Tokenizer, sequence_len: int) -> tuple[list[Question], list[Question], int]:
    """
    Returns training questions (as many as the run needs), test questions, and the number of questions that were skipped
    because they are too long.
    """
    max_prompt_tokens = sequence_len - flags.max_new_tokens
    limit = math.inf
    if flags.num_iterations > 0:
        limit = math.ceil(flags.num_iterations / flags.updates_per_batch) * flags.examples_per_step
    train_task = TASKS[flags.task]("train")
    questions, num_skipped = rollout.load_questions(train_task, tokenizer, max_prompt_tokens, limit)
    if flags.eval_every < 0:
        return questions, [], num_skipped
    test_task = limited(TASKS[flags.task]("test"), flags.eval_examples)
    test_questions, num_test_skipped = rollout.load_questions(test_task, tokenizer, max_prompt_tokens)
    return questions, test_questions, num_skipped + num_test_skipped


def plan_rollouts(flags: Flags, num_questions: int) -> RolloutPlan:
    num_batches = max(1, flags.num_epochs * num_questions // flags.examples_per_step)
    num_steps = flags.num_iterations if flags.num_iterations > 0 else num_batches * flags.updates_per_batch
    return RolloutPlan(
        num_steps,
        questions_per_batch=flags.examples_per_step,
        device_batch_size=flags.device_batch_size,
        steps_per_batch=flags.updates_per_batch,
        keep_zero_advantage=flags.kl_coef > 0,
    )


def transcript(r: Rollout, step: int, tokenizer: Tokenizer) -> str:
    """One line of JSON: a rollout as text."""
    prompt, completion = tokenizer.decode(r.prompt), tokenizer.decode(r.completion)
    line = {"step": step, "prompt": prompt, "answer": completion, "reward": r.reward, "advantage": r.advantage}
    return json.dumps(line) + "\n"


if __name__ == "__main__":
    main()
