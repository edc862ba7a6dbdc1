"""
The model card of an exported model: README.md with what the checkpoint and the report know about it.

Nothing is written by hand: parameters, the training of each stage, scores with their intervals, how they were measured,
limits, licence, and code to run. Scores are those that base_eval and chat_eval saved for this very checkpoint.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nanochat.checkpoint_manager import Checkpoint
from nanochat.common import duration, human, parse_json
from nanochat.costs import param_counts
from nanochat.export.common import Source
from nanochat.gpt import ADDITIONS, GPTConfig
from nanochat.logging import report_dir

STAGE_NAMES = {"base": "pretraining", "mid": "midtraining", "sft": "fine-tuning", "rl": "reinforcement learning"}
STAGE_OF_FOLDER = {
    "base_checkpoints": "base",
    "mid_checkpoints": "mid",
    "chatsft_checkpoints": "sft",
    "chatrl_checkpoints": "rl",
}
HOW_EVALUATED = {
    "base_eval": "`python -m scripts.base_eval`: CORE (arXiv 2406.11794), accuracy rescaled so that guessing is 0, and "
    "bits per byte of the validation shard.",
    "chat_eval": "`python -m scripts.chat_eval`: zero-shot, one completion per question unless it says otherwise. "
    "ChatCORE is the mean over tasks, rescaled so that guessing is 0. Intervals are 95 % confidence intervals.",
}

CHAT_CODE = """\
messages = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""

BASE_CODE = """\
inputs = tokenizer("<|bos|>The capital of France is", return_tensors="pt")  # documents start with <|bos|>
output = model.generate(**inputs, max_new_tokens=32)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""


def model_card(source: Source, *, needs_code: bool) -> str:
    """The content of README.md. needs_code: whether the folder has a modelling file (trust_remote_code)."""
    sections = [
        front_matter(),
        title(source),
        usage(source, needs_code),
        architecture(source),
        training(source),
        evaluation(source),
        limits(source),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def front_matter() -> str:
    return "---\nlicense: mit\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- nanochat\n---"


def title(source: Source) -> str:
    name = f"{source.checkpoint.tag} ({source.stage})"
    size = human(param_counts(source.config)["total"])
    kind = "A base model: it continues documents" if source.stage == "base" else "A chat model"
    return f"# nanochat {name}\n\n{kind}. {size} parameters, context of {source.config.sequence_len} tokens."


def usage(source: Source, needs_code: bool) -> str:
    option = ", trust_remote_code=True" if needs_code else ""
    code = BASE_CODE if source.stage == "base" else CHAT_CODE
    lines = [
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'path = "."  # this folder, or its name on the hub',
        f"tokenizer = AutoTokenizer.from_pretrained(path{option})",
        f"model = AutoModelForCausalLM.from_pretrained(path{option})",
        code,
        "```",
    ]
    if needs_code:
        lines += [
            "",
            "The architecture is in `modeling_nanochat.py`, which trust_remote_code allows transformers to run.",
        ]
    return "\n".join(lines)


def architecture(source: Source) -> str:
    config = source.config
    rows = [(name, f"{count:,}") for name, count in param_counts(config).items()]
    sizes = (
        f"{config.n_layer} layers, {config.n_embd} channels, {config.n_head} heads, {config.n_kv_head} key/value heads"
    )
    return "\n".join(
        [
            "## Model",
            "",
            f"{sizes}.",
            f"Vocabulary of {config.vocab_size:,} tokens (byte-level BPE, fingerprint {source.tokenizer.fingerprint}).",
            features(config),
            "",
            *table(("parameters", "number"), rows),
        ]
    )


def features(config: GPTConfig) -> str:
    """The parts that distinguish the model from a plain transformer."""
    names = ["rotary positions", "normed queries and keys", "relu²"]
    names += [name.replace("_", " ") for name in ADDITIONS if getattr(config, name)]
    if min(config.windows) < config.sequence_len:
        names.append(f"attention windows of {min(config.windows)} tokens ({config.window_pattern})")
    return f"It has {', '.join(names)}."


def training(source: Source) -> str:
    """A table of the stages that lead to the checkpoint, as far as their metadata is on this machine."""
    stages = list(ancestors(source))
    rows = []
    for stage, meta in reversed(stages):
        state, settings = meta.get("train_state", {}), meta.get("settings", {})
        step, batch = meta.get("step", 0), settings.get("total_batch_size", 0)
        tokens = human(step * batch) if batch else "unknown"
        time = duration(state["seconds"]) if state.get("seconds") else "unknown"
        rates = ", ".join(f"{name} {value:g}" for name, value in settings.items() if name.endswith("_lr"))
        rows.append((STAGE_NAMES[stage], f"{step:,}", tokens, time, rates or "unknown"))
    text = ["## Training", "", *table(("stage", "steps", "tokens", "time", "learning rates"), rows)]
    imported = [meta["imported_from"] for _, meta in stages if "imported_from" in meta]
    if imported:
        text += ["", f"Imported from {imported[0]}, where it was trained."]
    return "\n".join(text)


def ancestors(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """(stage, metadata) of the checkpoint and of those that it was trained from, the newest first."""
    stage, meta = source.stage, source.checkpoint.meta
    while True:
        yield stage, meta
        parent = Path(meta.get("base") or "")
        state = parent / "state.json"
        if not meta.get("base") or not state.exists() or parent.parent.parent.name not in STAGE_OF_FOLDER:
            return
        stage, meta = STAGE_OF_FOLDER[parent.parent.parent.name], parse_json(state.read_bytes())


def evaluation(source: Source) -> str:
    """The scores that the report has for this checkpoint, and how they were measured."""
    lines = ["## Evaluation", ""]
    rows = []
    for script in ("base_eval", f"chat_eval_{source.stage}"):
        scores = saved_scores(script, source.checkpoint)
        rows += [(name, f"{value:.4f}" if isinstance(value, float) else str(value)) for name, value in scores.items()]
        if scores:
            lines += [HOW_EVALUATED["base_eval" if script == "base_eval" else "chat_eval"], ""]
    if not rows:
        return "## Evaluation\n\nThis checkpoint was not evaluated before it was exported."
    return "\n".join([*lines, *table(("score", "value"), rows)])


def saved_scores(script: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """The numbers that an evaluation saved for the checkpoint, by name."""
    file = report_dir() / f"{script}.json"
    if not file.exists():
        return {}
    numbers = parse_json(file.read_bytes())
    if numbers.get("model") != str(checkpoint.path):
        return {}
    return {name: value for name, value in numbers.items() if name not in ("model", "time")}


def limits(source: Source) -> str:
    size = human(param_counts(source.config)["total"])
    lines = [
        "## Limits",
        "",
        f"A model of {size} parameters states false things fluently. It was not trained to refuse harmful requests. "
        "Use it to learn and to experiment, not where its answers matter.",
        "",
        f"It was trained on at most {source.config.sequence_len} tokens of context. Names of special tokens, such as "
        "`<|user_end|>`, in a user's text are parsed as special tokens by this tokenizer, as by all of transformers.",
        "",
        "## Licence",
        "",
        "The code and the weights are under the MIT licence; the licences of the training data apply to the data.",
    ]
    if source.stage != "base":
        lines.insert(
            4,
            "\nIt writes calls of a calculator between `<|python_start|>` and `<|python_end|>` and expects the result "
            "between `<|output_start|>` and `<|output_end|>`: nanochat fills it in, transformers does not.",
        )
    return "\n".join(lines)


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A table in Markdown."""
    return ["| " + " | ".join(row) + " |" for row in (header, tuple("---" for _ in header), *rows)]
