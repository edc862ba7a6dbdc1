"""
CORE: base_eval's code, which shares prefixes, compared with the usual code, which evaluates one item at a time: its
prompts are the rows of a padded batch, the logits of every token are computed, and the process is not tuned. Each side
runs in a separate process, with the same items of all 22 tasks. The verdicts of both should be the same.

    python -m scripts.bench core --eval-bundle ~/eval_bundle --data-dir ~/texts
    python -m scripts.bench core --model-tag d12                                  # a trained model

Without --model-tag, the model has random weights (depth 4, width 256, 2,048 tokens of context) and a vocabulary of
8,192 tokens learned from the data folder.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nanochat import checkpoint_manager, dataset, hardware
from nanochat.cli import COUNT, command, flag
from nanochat.eval.core import grade_items
from nanochat.eval.core_tasks import CoreTask, load_tasks, resolve_bundle, tokenize_items
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer
from scripts.bench.harness import print_table, report, run_in_process

SHARED, ONE_AT_A_TIME = "shared prefixes", "one at a time"
CONFIG = GPTConfig(sequence_len=2048, vocab_size=8192, n_layer=4, n_head=4, n_kv_head=4, n_embd=256)


@dataclass(frozen=True)
class Flags:
    max_per_task: int = flag(12, "items of each task", COUNT)
    eval_bundle: str = flag("", "folder of CORE's tasks; default: $NANOCHAT_EVAL_BUNDLE, else downloaded")
    data_dir: str = flag("", "folder of parquet shards to learn a vocabulary from; default: $NANOCHAT_DATA_DIR")
    model_tag: str = flag("", "tag of a base model; empty = random weights")
    device: str = flag("cpu", "cuda | mps | cpu | auto")


@command
def main(flags: Flags) -> dict[str, float]:
    """Returns the ratios."""
    bundle = resolve_bundle(flags.eval_bundle)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_dir = Path(folder)  # of the random model; a trained one has its own
        if not flags.model_tag:
            shards, _ = dataset.split_shards(dataset.resolve_data_dir(flags.data_dir))
            Tokenizer.train(dataset.iterate_texts(shards), CONFIG.vocab_size).save(tokenizer_dir)
        # The fast side runs before and after the slow one: that takes minutes, in which the machine's load may change.
        order = (SHARED, ONE_AT_A_TIME, SHARED)
        shared, alone, again = [run_in_process(measure, side, flags, bundle, tokenizer_dir) for side in order]
    shared["seconds"] = (shared["seconds"] + again["seconds"]) / 2
    num_items = len(shared["verdicts"])
    rows = {}
    for side, run in ((SHARED, shared), (ONE_AT_A_TIME, alone)):
        rows[side] = {
            "s": f"{run['seconds']:.1f}",
            "items/s": f"{num_items / run['seconds']:.2f}",
            "peak memory, GiB": f"{run['memory'] / 2**30:.2f}",
            "correct": str(sum(run["verdicts"])),
        }
    print_table(f"{num_items} items, {shared['machine']}", rows)
    different = sum(a != b for a, b in zip(shared["verdicts"], alone["verdicts"], strict=True))
    print(f"different verdicts: {different}")
    ratios = {"items/s": alone["seconds"] / shared["seconds"], "memory": alone["memory"] / shared["memory"]}
    seconds = {SHARED: shared["seconds"], ONE_AT_A_TIME: alone["seconds"]}
    return report("core", ratios, seconds=seconds, different=different)


def measure(side: str, flags: Flags, bundle: Path, tokenizer_dir: Path) -> dict[str, Any]:
    """Grades all items. Returns the seconds, without loading, the peak memory in bytes, and the verdicts."""
    device = hardware.pick_device(flags.device)
    tasks = load_tasks(bundle, flags.max_per_task)
    items = [(task, index) for task in tasks for index in range(len(task))]
    model, tokenizer = load_model(flags.model_tag, tokenizer_dir, device)
    start = time.perf_counter()
    if side == SHARED:
        hardware.tune_process(device)
        verdicts = grade_items(model, tokenizer, items)
    else:
        verdicts = [grade_alone(model, tokenizer, item) for item in items]
    return {
        "seconds": time.perf_counter() - start,
        "memory": hardware.peak_memory(device),
        "verdicts": verdicts,
        "machine": f"{hardware.describe(device)}, {model.dtype}",
    }


def load_model(model_tag: str, tokenizer_dir: Path, device: torch.device) -> tuple[GPT, Tokenizer]:
    dtype = hardware.pick_dtype(device)
    if model_tag:
        model, tokenizer, _ = checkpoint_manager.load_model("base", model_tag, -1, device, dtype)
        return model, tokenizer
    torch.manual_seed(0)
    model = GPT(CONFIG, device, dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)  # with the initial weights of training, layers would change nothing
    model.cast_weights()
    return model.eval(), Tokenizer.load(tokenizer_dir)


@torch.inference_mode()
def grade_alone(model: GPT, tokenizer: Tokenizer, item: tuple[CoreTask, int]) -> bool:
    """Grades one item with the usual code: a padded batch of its prompts, and the logits of all tokens."""
    task, index = item
    [prompts] = tokenize_items(tokenizer, [item], model.config.sequence_len)
    longest = max(len(prompt.tokens) for prompt in prompts.values())
    padded = [prompt.tokens + [tokenizer.bos] * (longest - len(prompt.tokens)) for prompt in prompts.values()]
    idx_BT = torch.tensor(padded, device=model.device)
    logits_BTV = model(idx_BT)
    losses_N = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), idx_BT[:, 1:].flatten(), reduction="none")
    losses_BT = losses_N.view(len(prompts), -1)
    most_likely_BT = logits_BTV.argmax(dim=-1)
    if task.kind == "language_modeling":
        [prompt] = prompts.values()
        return most_likely_BT[0, prompt.start - 1 : prompt.stop - 1].tolist() == prompt.tokens[prompt.start :]
    mean_losses = []
    for prompt, losses_T in zip(prompts.values(), losses_BT, strict=True):
        mean_losses.append(losses_T[prompt.start - 1 : prompt.stop - 1].mean().item())
    best = list(prompts)[mean_losses.index(min(mean_losses))]
    return best == task.items[index]["gold"]


if __name__ == "__main__":
    main()
