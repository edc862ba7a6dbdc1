"""
Choose text, datasets and sizes for this machine, print the plan, and write the flags of all stages for speedrun.sh.

    python -m scripts.speedrun --plan                 # print the plan and exit
    python -m scripts.speedrun --plan --for 8xH100    # the same for another machine

`decide` is a pure function of the user's settings and of facts about the machine, the network and the text. Its result
is saved in <base>/speedrun/decided.json. A restart reads it from there: if it decided again, it could choose other
sizes, for example because the network is down.
"""

import json
import math
import os
import shlex
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from nanochat import dataset, fp8, hardware, mixture, planner
from nanochat.cards import find_machine
from nanochat.cli import command, flag, parse
from nanochat.common import UserError, atomic_path, base_dir, duration, parse_json
from nanochat.costs import TrainingSetup, flops_per_token, training_memory
from nanochat.logging import print_table
from nanochat.planner import Target
from nanochat.recipe import RecipeFlags, derive
from nanochat.sources import COMPRESSION_RATIO, HubSource, find_sources
from scripts import base_train
from tasks.hub import find_in_mirror

# The recipe that reaches GPT-2's CORE score in the shortest time that was published for ClimbMix alone: 82 minutes on
# 8xH100 with FP8 (karpathy/nanochat #830; docs/time_to_gpt2.md has ours). Smaller and trained on more tokens per
# parameter than depth 24 with a ratio of 8 (99 minutes); twice as many steps with half the batch that the horizon would
# give. A larger vocabulary makes fewer tokens of the same text. The schedule is base_train's default (warm-down 0.65,
# final rate 0.05). It is used on GPUs that need at most MAX_HOURS for it; other GPUs train the deepest model that they
# finish in this time.
GPT2_RECIPE = ["--depth", "22", "--target-param-data-ratio", "9.4", "--total-batch-size", "524288"]
# A validation takes about 10 s there: 42 of them, every 250 steps, would add 7 minutes. Checkpoints, of 16 GB with the
# optimizer, are saved every SAVE_MINUTES only.
GPT2_OPTIONS = ["--eval-every", "1000", "--sample-every", "2000"]
GPT2_VOCAB_SIZE = 49152
MAX_HOURS = 5.0  # of pretraining; heuristic: an RTX 4090 then trains depth 12
FP8_DEPTH = 20  # smaller models gain little from FP8 (heuristic); NANOCHAT_FP8=0 turns it off
DEPTH_OF_UNKNOWN_CARD = {1: 12, 2: 16, 4: 20}  # by number of GPUs; more train the public recipe
SAVE_MINUTES = 20  # between checkpoints at most: what a machine that is taken away loses
VOCAB_SIZE = 32768
# Tokens that training sees of a public shard, by vocabulary. A shard has about 52 M with 32,768, of which packing crops
# a third. With 49,152 they are a few percent fewer (estimate: at most 7).
TOKENS_PER_SHARD = {VOCAB_SIZE: 34.5e6, GPT2_VOCAB_SIZE: 32e6}
# (bytes of text, vocabulary): the vocabulary is that of the first pair with at most as many bytes as the text.
# Heuristic: 69 MB were enough for 8,192, 46 KB allow 2,600.
VOCAB_BY_BYTES = ((250e6, 32768), (8e6, 8192), (100e3, 2048), (0, 1024))

# The embedded corpus is learned in 240 + 240 steps (docs/lab_notes.md).
PRIMER_STEPS = 240
PRIMER_SFT_STEPS = 240
PRIMER_BATCH = 4096

# Tokens of fine-tuning on the public datasets, estimated for the plan: 460,000 conversations of about 900 tokens
# (SmolTalk), and 600,000 others of about 150.
SFT_TOKENS_PUBLIC = 500e6

CHAT_CORE = "ARC-Easy,ARC-Challenge,MMLU,GSM8K,HumanEval,SpellingBee"  # the six tasks of ChatCORE
PUBLIC_DATASETS = (  # that fine-tuning and ChatCORE need
    "HuggingFaceTB/smol-smoltalk", "cais/mmlu", "openai/gsm8k", "allenai/ai2_arc", "openai/openai_humaneval"
)  # fmt: skip
PUBLIC_SOURCES = ("smoltalk", "mmlu", "gsm8k", "simplespelling", "spellingbee", "identity")


@dataclass(frozen=True)
class Settings:
    """What the user has set in environment variables. When one of them changes, all stages run again."""

    mode: str = ""  # NANOCHAT_SPEEDRUN: "" or tiny
    data_dir: str = ""  # a folder of shards, text to convert, or a mixture (mixture.py)
    datasets_dir: str = ""
    dtype: str = ""
    fp8: bool = True  # NANOCHAT_FP8=0: never train in FP8


@dataclass(frozen=True)
class Facts:
    """What `decide` needs to know about the machine, the network and the user's text."""

    device: str  # cuda | mps | cpu
    gpus: int = 0  # a power of two, so that it divides the batch
    card: str = ""  # the GPUs' name in cards.py; "" = not in the table
    dtype: str = ""  # to compute in; "" = the device's default
    has_fp8: bool = False  # whether products in FP8 work, on a GPU from Ada and Hopper on
    online: bool = False  # whether the hub responds
    text: str = ""  # what data_dir is: "" (not set) | shards | files | mixture
    text_bytes: float = math.inf  # its approximate size


@dataclass(frozen=True)
class Decisions:
    """The flags of all stages, and why they were chosen."""

    device: str
    gpus: int
    card: str
    dtype: str
    text: str  # description of the text, for the plan
    chat: str  # description of the conversations
    data_dir: str
    vocab_size: int
    sft_tokens: float  # of fine-tuning, estimated
    data: list[str]  # the command that makes the shards; empty if there is nothing to do
    launch: list[str]  # the command that starts a stage; the name of the stage and its flags follow
    base_train: list[str]
    base_eval: list[str]
    chat_sft: list[str]
    chat_eval: list[str]
    questions: list[str]  # for the trained model


# ---- decisions: pure functions ----


def decide(settings: Settings, facts: Facts, base: Path) -> Decisions:
    """Returns what the speedrun does. `base` is the folder for generated and converted text."""
    text = choose_text(settings, facts, base)
    chat = choose_chat(settings, facts, text)
    size = choose_size(settings, facts, text)
    shared = ["--model-tag", "speedrun", "--save-every", str(size.save_every)]
    shared += ["--save-minutes", str(SAVE_MINUTES), "--keep-last", "1"]
    launch = ["python", "-m"]
    if facts.gpus > 1:
        launch = ["torchrun", "--standalone", f"--nproc_per_node={facts.gpus}", "-m"]
    data = text.command
    evals = "bpb,sample"
    if text.kind == "public":
        recipe = derive(parse(RecipeFlags, size.recipe_flags), size.vocab_size)
        tokens_per_shard = TOKENS_PER_SHARD[size.vocab_size]
        num_shards = math.ceil(recipe.num_iterations * recipe.total_batch_size / tokens_per_shard)
        data = ["python", "-m", "nanochat.dataset", "-n", str(num_shards)]
        evals = "core,bpb,sample"
    eval_tokens = str(size.eval_tokens)
    validation_tokens = str(size.validation_tokens or size.eval_tokens)
    return Decisions(
        device=facts.device,
        gpus=facts.gpus,
        card=facts.card,
        dtype=settings.dtype or facts.dtype,
        text=text.description,
        chat=chat.description,
        data_dir=text.data_dir,
        vocab_size=size.vocab_size,
        sft_tokens=chat.tokens,
        data=data,
        launch=launch,
        base_train=[*size.recipe_flags, *size.options, "--eval-tokens", validation_tokens, *shared],
        base_eval=["-g", "speedrun", "--eval", evals, "--max-per-task", "500", "--split-tokens", eval_tokens],
        chat_sft=["--base-tag", "speedrun", *chat.sft, *shared],
        chat_eval=["-i", "sft", "-g", "speedrun", *chat.evaluation],
        questions=chat.questions,
    )


@dataclass(frozen=True)
class Text:
    kind: str  # given | public | primer
    description: str
    data_dir: str  # for NANOCHAT_DATA_DIR; "" = the public shards
    command: list[str] = field(default_factory=list)


def choose_text(settings: Settings, facts: Facts, base: Path) -> Text:
    if facts.text == "files":
        shards = str(base / "text")
        convert = ["python", "-m", "scripts.make_shards", settings.data_dir, "--out", shards]
        return Text("given", f"{settings.data_dir} (NANOCHAT_DATA_DIR), converted to shards", shards, convert)
    if facts.text:
        return Text("given", f"{settings.data_dir} (NANOCHAT_DATA_DIR)", settings.data_dir)
    if not settings.mode and facts.device == "cuda" and facts.online:
        return Text("public", "the public shards (there is a GPU and a network)", "")
    folder = str(base / "primer")
    reason = (
        "NANOCHAT_SPEEDRUN=tiny" if settings.mode else "no CUDA GPU or no network, and NANOCHAT_DATA_DIR is not set"
    )
    make = ["python", "-m", "scripts.primer", "--data-dir", folder]
    return Text("primer", f"the embedded corpus ({reason})", folder, make)


@dataclass(frozen=True)
class Chat:
    description: str
    sft: list[str]  # flags of chat_sft
    tokens: float  # of fine-tuning
    evaluation: list[str]  # flags of chat_eval
    questions: list[str]  # for the model at the end


def choose_chat(settings: Settings, facts: Facts, text: Text) -> Chat:
    """The conversations to fine-tune and evaluate on."""
    questions = ["What is the capital of France?", "What is 47 + 85?", "Who are you?"]
    primer_sft = [f"--{name}-epochs=0" for name in PUBLIC_SOURCES] + ["--primer-epochs", "1"]
    primer_evaluation = ["-a", "QuizFree,QuizChoice,Sums", "-m", "64"]
    if settings.mode == "tiny":
        sft = [*primer_sft, "--num-iterations", "20", "--sample-every", "10", "--eval-examples", "32", "--no-compile"]
        evaluation = [*primer_evaluation, "-x", "16"]
        return Chat("the embedded conversations (NANOCHAT_SPEEDRUN=tiny)", sft, 20 * 2048, evaluation, questions[:1])
    if settings.datasets_dir:
        description = f"{settings.datasets_dir} (NANOCHAT_DATASETS_DIR)"
    elif text.kind != "primer" and facts.online:
        description = "the public datasets"
    else:
        description = "the embedded conversations (no network, or the embedded corpus as text)"
        # Two passes over the conversations: one has 119 steps.
        sft = [*primer_sft, "--num-iterations", str(PRIMER_SFT_STEPS), "--sample-every", str(PRIMER_SFT_STEPS // 2)]
        return Chat(description, sft, PRIMER_SFT_STEPS * PRIMER_BATCH, primer_evaluation, questions)
    if facts.device == "cuda":
        return Chat(description, [], SFT_TOKENS_PUBLIC, ["-a", CHAT_CORE], questions)
    # Without the spelling tasks, which would fill most of the 250 optimizer steps.
    sft = ["--num-iterations", "250", "--identity-epochs", "10", "--simplespelling-epochs=0", "--spellingbee-epochs=0"]
    return Chat(description, sft, 250 * 8192, ["-a", CHAT_CORE, "-x", "200"], questions)


@dataclass(frozen=True)
class Size:
    vocab_size: int
    recipe_flags: list[str]
    options: list[str]  # further flags of base_train
    eval_tokens: int  # of base_eval
    save_every: int = 250  # 0 = at the end, and every SAVE_MINUTES
    validation_tokens: int = 0  # of each validation during training; 0 = eval_tokens


def choose_size(settings: Settings, facts: Facts, text: Text) -> Size:
    """The size of the model and of its training run. Each stage chooses its rows per pass when it starts."""
    vocab_size = vocab_size_for(facts.text_bytes)
    if settings.mode == "tiny":
        recipe = ["--depth", "2", "--head-dim", "64", "--max-seq-len", "256"]
        recipe += ["--total-batch-size", "2048", "--num-iterations", "40"]
        options = ["--eval-every", "0", "--sample-every", "10", "--no-compile"]
        return Size(min(vocab_size, 1024), recipe, options, 8192, save_every=10)
    small = ["--depth", "4", "--head-dim", "64", "--max-seq-len", "512"]
    if text.kind == "primer":
        recipe = [*small, "--total-batch-size", str(PRIMER_BATCH), "--num-iterations", str(PRIMER_STEPS)]
        # Validations of a third of the text: each of 65,536 tokens would take 2.5 s.
        options = ["--eval-every", str(PRIMER_STEPS // 2), "--sample-every", str(PRIMER_STEPS // 2)]
        return Size(2048, recipe, options, 32768, validation_tokens=16384)
    if facts.device != "cuda":
        vocab_size = min(vocab_size, 8192)
        eval_tokens = 524288 if vocab_size == 8192 else 65536
        return Size(vocab_size, [*small, "--total-batch-size", "8192", "--num-iterations", "500"], [], eval_tokens)
    return gpu_size(facts, vocab_size, use_fp8=settings.fp8 and facts.has_fp8)


def vocab_size_for(text_bytes: float) -> int:
    """The largest vocabulary that this much text is enough for."""
    return next(vocab_size for limit, vocab_size in VOCAB_BY_BYTES if text_bytes >= limit)


def gpu_size(facts: Facts, vocab_size: int, *, use_fp8: bool) -> Size:
    """The recipe for GPT-2 if it fits and the GPUs train it in MAX_HOURS, else the deepest model that does."""
    eval_tokens = 80 * 524288
    fp8_flag = ["--fp8"] if use_fp8 else []
    gpt2_vocab_size = GPT2_VOCAB_SIZE if vocab_size == VOCAB_SIZE else vocab_size  # less text needs a smaller one
    if not facts.card:
        known_depth = DEPTH_OF_UNKNOWN_CARD.get(facts.gpus)
        if not known_depth:
            return Size(gpt2_vocab_size, GPT2_RECIPE, [*GPT2_OPTIONS, *fp8_flag], eval_tokens, save_every=0)
        return Size(
            vocab_size, ["--depth", str(known_depth)], fp8_flag if known_depth >= FP8_DEPTH else [], eval_tokens
        )
    machine = f"{facts.gpus}x{facts.card}"
    recipe = derive(parse(RecipeFlags, GPT2_RECIPE), gpt2_vocab_size)
    target = planner.named_target(machine, use_fp8)
    setup = planner.training_setup(recipe.model, target, recipe.total_batch_size, TrainingSetup(rows=-1, fp8=use_fp8))
    fits = training_memory(recipe.model, setup).peak <= target.memory
    if fits and target.seconds(recipe.model, recipe.flops) <= 3600 * MAX_HOURS:
        return Size(gpt2_vocab_size, GPT2_RECIPE, [*GPT2_OPTIONS, *fp8_flag], eval_tokens, save_every=0)
    target = planner.named_target(machine, fp8=False)
    depth = planner.depth_for(RecipeFlags(), vocab_size, target, 3600 * MAX_HOURS)
    depth = max(1, depth - depth % 2)  # the width of an odd depth is rounded up to whole heads
    return Size(vocab_size, ["--depth", str(depth)], fp8_flag if depth >= FP8_DEPTH else [], eval_tokens)


# ---- facts ----


def read_settings(start_dir: Path) -> Settings:
    """The environment variables, with absolute paths. Raises UserError if one of them is invalid."""
    mode = os.environ.get("NANOCHAT_SPEEDRUN", "")
    if mode not in ("", "tiny"):
        raise UserError(f"NANOCHAT_SPEEDRUN is {mode}: use tiny, or unset it")
    hardware.pick_dtype(torch.device("cpu"))  # checks $NANOCHAT_DTYPE
    fp8_setting = os.environ.get("NANOCHAT_FP8", "1")
    if fp8_setting not in ("0", "1"):
        raise UserError(f"NANOCHAT_FP8 is {fp8_setting}: use 0 for training without FP8, or unset it")
    data_dir = os.environ.get("NANOCHAT_DATA_DIR", "")
    path = start_dir / Path(data_dir).expanduser()
    if data_dir and path.exists():
        data_dir = str(path.resolve())
    elif data_dir and not dataset.is_mixture(data_dir) and data_dir not in mixture.KNOWN:
        raise UserError(
            f"NANOCHAT_DATA_DIR is {data_dir}, which is no folder, file or mixture: correct it, as in name=0.8,name=0.2"
        )
    datasets_dir = folder_of("NANOCHAT_DATASETS_DIR", start_dir)
    if datasets_dir and not mode:
        for repo in PUBLIC_DATASETS:
            find_in_mirror(Path(datasets_dir), repo)
    return Settings(
        mode=mode,
        data_dir=data_dir,
        datasets_dir=datasets_dir,
        dtype=os.environ.get("NANOCHAT_DTYPE", ""),
        fp8=fp8_setting == "1",
    )


def folder_of(variable: str, start_dir: Path) -> str:
    """The absolute path of the folder that an environment variable names; "" if it is not set."""
    value = os.environ.get(variable)
    if not value:
        return ""
    path = start_dir / Path(value).expanduser()
    if not path.is_dir():
        raise UserError(f"{variable} is {value}, which is not a folder: correct it or unset it")
    return str(path.resolve())


def find_facts(settings: Settings, for_: str, base: Path) -> Facts:
    """Facts about the machine that `for_` names; "" = this one."""
    text, text_bytes = inspect_text(settings.data_dir, base)
    if for_:
        card, count = find_machine(for_)
        gpus = hardware.power_of_two(count)
        facts = Facts("cuda", gpus, card.name, has_fp8=card.has_fp8, online=True)
        return replace(facts, text=text, text_bytes=text_bytes)
    device = hardware.pick_device()
    is_gpu = device.type == "cuda"
    known = hardware.gpu_card(device)
    prefers_bfloat16 = device.type == "cpu" and not settings.dtype and hardware.bf16_faster_on_cpu()
    may_use_hub = settings.mode != "tiny" and (is_gpu or bool(text))
    return Facts(
        device=device.type,
        gpus=hardware.power_of_two(torch.cuda.device_count()) if is_gpu else 0,
        card=known.name if known else "",
        dtype="bfloat16" if prefers_bfloat16 else "",
        has_fp8=fp8.works_on(device),
        online=may_use_hub and is_online(),
        text=text,
        text_bytes=text_bytes,
    )


def inspect_text(data_dir: str, base: Path) -> tuple[str, float]:
    """What NANOCHAT_DATA_DIR is (see Facts.text), and its approximate size in bytes."""
    if not data_dir:
        return "", math.inf
    path = Path(data_dir)
    if not path.exists():
        return "mixture", math.inf
    shards = list(path.glob("*.parquet"))
    if shards:
        return "shards", COMPRESSION_RATIO * sum(shard.stat().st_size for shard in shards)
    sources, _ = find_sources([data_dir], "text", exclude=base / "text")
    return "files", sum(source.estimate_bytes() for source in sources if not isinstance(source, HubSource))


def is_online() -> bool:
    """Whether the hub responds, even with an error."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true"):
        return False
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5)
    except (OSError, ValueError) as error:  # ValueError: HF_ENDPOINT is not an address
        return isinstance(error, urllib.error.HTTPError)  # a response, though with an error status
    return True


# ---- the plan ----


def print_plan(decisions: Decisions) -> None:
    """Prints what was chosen and why, and what pretraining and fine-tuning need."""
    flags = parse(base_train.Flags, decisions.base_train)
    recipe = derive(flags, decisions.vocab_size)
    config = recipe.model
    target = find_target(decisions, flags.fp8)
    wanted = base_train.wanted_setup(flags)
    setup = planner.training_setup(config, target, recipe.total_batch_size, wanted)
    rows = planner.training_rows(config, setup, target, num_steps=recipe.num_iterations, flops=recipe.flops)
    print_table(
        "Plan of the speedrun",
        [
            ("text", decisions.text),
            ("chat", decisions.chat),
            ("vocabulary", f"{decisions.vocab_size:,} tokens"),
            ("base_train", shlex.join(decisions.base_train)),
        ],
    )
    print_table("Pretraining", rows)

    sft_target = find_target(decisions, fp8=False) if flags.fp8 else target
    sft_wanted = replace(wanted, fp8=False)
    sft_setup = planner.training_setup(config, sft_target, recipe.total_batch_size, sft_wanted)
    if sft_setup.rows > setup.rows:  # fine-tuning uses at most the rows of pretraining
        sft_setup = replace(sft_setup, rows=setup.rows, accumulation=setup.accumulation)
    num_steps = max(1, round(decisions.sft_tokens / recipe.total_batch_size))
    sft_flops = float(num_steps * recipe.total_batch_size) * flops_per_token(config)
    rows = planner.training_rows(config, sft_setup, sft_target, num_steps=num_steps, flops=sft_flops)
    shown = ("batch", "training", "time", "cost", "memory per rank")
    print_table("Fine-tuning (the number of tokens is an estimate)", [row for row in rows if row[0] in shown])

    seconds = target.seconds(config, recipe.flops) + sft_target.seconds(config, sft_flops)
    print(f"Together {duration(seconds)}; text, tokenizer and evaluations take additional time.", flush=True)


def find_target(decisions: Decisions, fp8: bool) -> Target:
    if decisions.card:
        target = planner.named_target(f"{decisions.gpus}x{decisions.card}", fp8)
    else:
        device = hardware.pick_device(decisions.device)
        target = planner.local_target(device, max(1, decisions.gpus), hardware.pick_dtype(device), fp8)
    return replace(target, dtype=hardware.DTYPES[decisions.dtype]) if decisions.dtype else target


# ---- files: decisions for the next start, variables for bash ----


def load_decisions(file: Path, settings: Settings) -> Decisions | None:
    """The decisions of an earlier start with the same settings; None if there are none."""
    try:
        saved = parse_json(file.read_bytes())
        return Decisions(**saved["decisions"]) if saved["settings"] == asdict(settings) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # not there, or written by another version
        return None


def save_decisions(file: Path, settings: Settings, decisions: Decisions) -> None:
    """Saves the decisions for the next start. Removes the marks of stages that ran with other decisions."""
    if file.exists():
        print("the settings differ from those of the last run: all stages run again")
    for mark in [*file.parent.glob("*.started"), *file.parent.glob("*.done")]:
        mark.unlink()
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps({"settings": asdict(settings), "decisions": asdict(decisions)}, indent=1))


def shell_variables(decisions: Decisions, datasets_dir: str, eval_bundle: str, wandb_run: str) -> str:
    """Assignments for bash: exported variables, and an array for each command or list of flags."""
    exported = {
        "NANOCHAT_DATA_DIR": decisions.data_dir,
        "NANOCHAT_DATASETS_DIR": datasets_dir,
        "NANOCHAT_EVAL_BUNDLE": eval_bundle,
        "NANOCHAT_DTYPE": decisions.dtype,
    }
    base_eval = decisions.base_eval
    if eval_bundle:
        base_eval = ["core,bpb,sample" if word == "bpb,sample" else word for word in base_eval]
    run = ["--run", wandb_run] if wandb_run else []
    arrays = {
        "data": decisions.data,
        "launch": decisions.launch,
        "tok_train": ["--vocab-size", str(decisions.vocab_size)],
        "base_train": decisions.base_train + run,
        "base_eval": base_eval,
        "chat_sft": decisions.chat_sft + run,
        "chat_eval": decisions.chat_eval,
        "questions": decisions.questions,
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in exported.items() if value]
    lines += [f"{name}=({shlex.join(words)})" for name, words in arrays.items()]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Flags:
    plan: bool = flag(False, "print the plan of all stages and exit: nothing is downloaded or written")
    for_: str = flag("", "with --plan: another machine to plan for, such as 8xH100 or 1xRTX4090")
    start_dir: str = flag(".", "folder that relative paths in environment variables start from")


@command
def main(flags: Flags) -> None:
    if flags.for_ and not flags.plan:
        raise UserError("--for plans for another machine: use it with --plan")
    start_dir = Path(flags.start_dir).resolve()
    settings = read_settings(start_dir)
    eval_bundle = folder_of("NANOCHAT_EVAL_BUNDLE", start_dir)
    base = (start_dir / base_dir()).resolve()
    file = base / "speedrun" / "decided.json"
    saved = None if flags.for_ else load_decisions(file, settings)
    decisions = saved or decide(settings, find_facts(settings, flags.for_, base), base)
    if saved:
        print(f"as decided at the first start (remove {file.parent} to decide again):")
    elif not flags.plan:
        save_decisions(file, settings, decisions)
    print_plan(decisions)
    if flags.plan:
        return
    variables = shell_variables(decisions, settings.datasets_dir, eval_bundle, os.environ.get("WANDB_RUN", ""))
    with atomic_path(file.with_name("stages.sh")) as temporary:
        temporary.write_text(variables)


if __name__ == "__main__":
    main()
