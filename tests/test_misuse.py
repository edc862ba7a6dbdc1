"""
What people get wrong at the command line, over all scripts: each mistake ends in one line that names the remedy, with
an exit code other than 0, and before any expensive work. Mistakes that need a trained model are in test_stages.py.

    python -m pytest tests/test_misuse.py
"""

import importlib

import pytest
from factories import refusal, save_checkpoint, tiny_gpt, write_shards

from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer

RATES = ["--embedding-lr", "--unembedding-lr", "--matrix-lr", "--scalar-lr", "--weight-decay"]

# (script, arguments, words of the error). The arguments are complete: nothing else is wrong with them.
NUMBERS = [
    # lengths, batches and horizons
    ("base_train", "--depth 0", "--depth: 0 must be from 1 to 200 (transformer layers"),
    ("base_train", "--depth -1", "--depth: -1 must be from 1 to 200"),
    ("base_train", "--depth 10000", "--depth: 10000 must be from 1 to 200"),
    ("base_train", "--depth two", "--depth: 'two' is not a whole number"),
    ("base_train", "--depth 4.5", "--depth: '4.5' is not a whole number"),
    ("base_train", "--head-dim 8", "--head-dim: 8 must be at least 16 (channels"),
    ("base_train", "--aspect-ratio 0", "--aspect-ratio: 0 must be at least 1"),
    ("base_train", "--max-seq-len 0", "--max-seq-len: 0 must be at least 1 (tokens of context)"),
    ("base_train", "--num-iterations 0", "--num-iterations: 0 must be at least 1 or -1 (optimizer steps"),
    ("base_train", "--num-iterations 1e3", "--num-iterations: '1e3' is not a whole number"),
    ("base_train", "--total-batch-size 0", "--total-batch-size: 0 must be at least 1 or -1 (tokens"),
    ("base_train", "--device-batch-size 0", "--device-batch-size: 0 must be at least 1 or auto (sequences"),
    ("base_train", "--device-batch-size many", "'many' is not a whole number or auto"),
    ("base_train", "--target-flops inf", "--target-flops: inf must be above 0 or -1 (training FLOPs"),
    ("base_train", "--target-flops nan", "--target-flops: nan must be above 0 or -1"),
    ("base_train", "--target-param-data-ratio nan", "--target-param-data-ratio: nan must be above 0 (training tokens"),
    ("base_train", "--target-param-data-ratio inf", "--target-param-data-ratio: inf must be above 0"),
    ("base_train", "--target-param-data-ratio 0", "--target-param-data-ratio: 0 must be above 0"),
    ("base_train", "--warmdown-ratio nan", "--warmdown-ratio: nan must be from 0 to 1 (share of the run"),
    ("base_train", "--warmdown-ratio 2", "--warmdown-ratio: 2 must be from 0 to 1"),
    ("base_train", "--final-lr-frac -0.1", "--final-lr-frac: -0.1 must be from 0 to 1"),
    *(("base_train", f"{name} -1", f"{name}: -1 must be at least 0") for name in RATES),
    ("base_train", "--warmup-steps -2", "--warmup-steps: -2 must be at least 0 or -1"),
    ("base_train", "--save-every -7", "--save-every: -7 must be at least 0 or -1 (steps between checkpoints"),
    ("base_train", "--eval-every -2", "--eval-every: -2 must be at least 0 or -1"),
    ("base_train", "--keep-last 0", "--keep-last: 0 must be at least 1 or -1 (checkpoints to keep"),
    ("base_train", "--eval-tokens -5", "--eval-tokens: -5 must be at least 1 (validation tokens"),
    ("base_train", "--seed -1", "--seed: -1 must be from 0 to 9,223,372,036,854,775,807"),
    ("base_train", f"--seed {10**30}", "must be from 0 to 9,223,372,036,854,775,807 (seed of initial weights"),
    ("base_train", "--hours -1", "--hours: -1 must be at least 0"),
    ("chat_sft", "--num-iterations 0", "--num-iterations: 0 must be at least 1 or -1"),
    ("chat_sft", "--total-batch-size 0", "--total-batch-size: 0 must be at least 1 or -1"),
    ("chat_sft", "--eval-examples 0", "--eval-examples: 0 must be at least 1 (held-out conversations"),
    ("chat_sft", "--primer-epochs -1", "--primer-epochs: -1 must be at least 0 (times through"),
    ("chat_sft", "--base-step -7", "--base-step: -7 must be at least 0 or -1 (step of the checkpoint"),
    ("chat_sft", "--init-lr-frac 0", "--init-lr-frac: 0 must be above 0"),
    ("chat_sft", "--lora-rank -4", "--lora-rank: -4 must be at least 0"),
    ("mid_train", "--init-lr-frac -1", "--init-lr-frac: -1 must be above 0"),
    ("chat_rl", "--num-samples 1", "--num-samples: 1 must be at least 2 (completions sampled per question"),
    ("chat_rl", "--temperature 0", "--temperature: 0 must be above 0"),
    ("chat_rl", "--clip-ratio 1.5", "--clip-ratio: 1.5 must be from 0 to 1"),
    ("chat_rl", "--kl-coef -1", "--kl-coef: -1 must be at least 0"),
    ("chat_rl", "--examples-per-step 0", "--examples-per-step: 0 must be at least 1"),
    ("chat_rl", "--eval-examples 0", "--eval-examples: 0 must be at least 1"),
    ("base_eval", "--device-batch-size 0", "--device-batch-size: 0 must be at least 1 or -1"),
    ("base_eval", "--max-per-task 0", "--max-per-task: 0 must be at least 1 or -1"),
    ("base_eval", "--split-tokens 0", "--split-tokens: 0 must be at least 1"),
    ("chat_eval", "-b 0", "-b/--batch-size: 0 must be at least 1"),
    ("chat_eval", "-x 0", "-x/--max-problems: 0 must be at least 1 or -1"),
    ("chat_eval", "-k -1", "-k/--top-k: -1 must be at least 0"),
    ("chat_eval", "-n 8 -t 1 --pass-k all", "--pass-k: 'all' is not a whole number (comma-separated"),
    ("chat_cli", "-t -1", "-t/--temperature: -1 must be at least 0 (sampling temperature"),
    ("chat_cli", "-s -7", "-s/--step: -7 must be at least 0 or -1"),
    ("chat_web", "-t 3", "-t/--temperature: 3 must be from 0 to 2"),
    ("chat_web", "-m 0", "-m/--max-tokens: 0 must be from 1 to 4,096"),
    ("chat_web", "--num-rows 0", "--num-rows: 0 must be at least 1"),
    ("chat_web", "--port 70000", "--port: 70000 must be from 0 to 65,535"),
    ("chat_web", "--shutdown-seconds nan", "--shutdown-seconds: nan must be at least 0"),
    ("tok_train", "--vocab-size 0", "--vocab-size: 0 must be at least 1"),
    ("make_shards", "texts --out shards --min-chars 0", "--min-chars: 0 must be at least 1"),
    ("make_shards", "texts --out shards --max-gigabytes -1", "--max-gigabytes: -1 must be at least 0"),
    ("show_conversation", "--num 0", "--num: 0 must be at least 1"),
    ("primer", "--seed -1", "--seed: -1 must be from 0"),
    ("bench.memory", "--depths 4,x", "--depths: 'x' is not a whole number (depths to measure, separated by commas)"),
    ("bench.infer", "--batch-sizes 1,0", "--batch-sizes: 0 must be at least 1"),
    ("bench.serve", "--users 0", "--users: 0 must be at least 1"),
]

WORDS = [
    ("base_train", "--depht 4", "unrecognized arguments: --depht 4; see --help"),
    ("base_train", "--device tpu", "--device tpu: unknown, use auto, cuda, mps or cpu"),
    ("base_train", "--head-dim 17", "--head-dim 17: must be even"),
    ("base_train", "--depth 2 --window-pattern SX", "use the letters S (short) and L (full)"),
    ("base_train", "--hours 1 --budget 5", "--hours and --budget both choose the depth: give only one"),
    ("base_train", "--for 8xH100", "--for plans for another machine: use it with --plan"),
    ("base_train", "--plan --for 8xH1", "--for 8xH1: write the number of GPUs and the card, as in 8xH100"),
    ("base_train", "--depth 2 --model-tag a/b", "--model-tag 'a/b' must be a plain folder name"),
    ("chat_sft", "-i rl", "invalid choice: 'rl'"),
    ("chat_rl", "--task poems", "invalid choice: 'poems'"),
    ("chat_rl", "--top-k 1", "--top-k 1: completions must differ to be compared, use at least 2"),
    ("chat_rl", "--updates-per-batch 2", "needs a limit on the change: give --clip-ratio, such as 0.2"),
    ("chat_eval", "-a Quiz", "unknown task 'Quiz': choose among ARC-Easy"),
    ("chat_eval", "-n 8", "greedy completions are all the same, add --temperature 0.8"),
    ("base_eval", "--eval cor", "--eval cor: choose among core, bpb, sample"),
    ("chat_cli", "-g nothing", "no sft checkpoint with tag 'nothing': there are tiny"),
    ("chat_cli", "-i raw", "invalid choice: 'raw'"),
    ("chat_cli", "-s 7", "has no checkpoint of step 7: it has 1"),
    ("chat_web", "-i sft,raw", "unknown stage 'raw': use base, mid, sft, rl"),
    ("export", "", "--out is missing: name the file or folder to write"),
    ("import_model", "owner/name", "--model-tag is missing: choose a name for the model"),
    ("make_shards", "nowhere --out shards", "nowhere does not exist: check the path"),
    ("bench.infer", "--depth 150 --device cpu", "use a smaller --depth or fewer rows"),
    ("bench.train", "--depth 150 --device cpu", "or less"),
    ("bench.rollout", "--fresh-depth 150 --device cpu", "use a smaller --depth or fewer rows"),
    ("base_train", "--depth 150 --device cpu", "or less"),
    ("experiment", "lr", "variant 'lr': write NAME=FLAGS, NAME@REF or NAME@REF=FLAGS"),
    ("experiment", "baseline=", "variant 'baseline': that is the name of the runs with --train-flags only"),
    ("experiment", "lr= lr=", "two variants are named 'lr': give them different names"),
    ("experiment", "lr=--matrix-lr=x", "flags of lr: argument --matrix-lr: 'x' is not a number"),
    ("experiment", "lr=--head-dim=17", "flags of lr at depth 4: --head-dim 17: must be even"),
    ("experiment", "lr=--depth=3", "flags of lr: scripts.experiment chooses --depth, leave it out"),
    ("experiment", "lr=--num-iterations=3", "flags of lr: all variants have the same budget"),
    ("experiment", "lr@nowhere", "git knows no branch or commit 'nowhere'"),
    ("experiment", "--train-flags=--head-dim=x", "flags of baseline: argument --head-dim: 'x' is not a whole number"),
    ("experiment", "--name a/b", "--name 'a/b': use letters, digits and . - _ only"),
    ("experiment", "--stage sft", "--stage sft trains on base models: name them, as in --base-tags d4,d6"),
    ("experiment", "--eval-flags=-aSums", "--eval-flags are for --stage sft"),
    ("experiment", "--gpus-per-run 64", "--gpus-per-run 64: this machine has"),
    ("speedrun", "--for 8xH100", "--for plans for another machine: use it with --plan"),
]


FOLDERS = [  # what a variable or a flag names is a file, or missing
    ("tok_train", "", "NANOCHAT_BASE_DIR", "file", "NANOCHAT_BASE_DIR is file, which is a file: set it to a folder"),
    ("base_train", "--depth 2", "NANOCHAT_DATA_DIR", "file", "file is a file, not a folder: download some"),
    ("base_train", "--depth 2 --data-dir file=1.0", "", "", "file is neither a folder nor one of the known datasets"),
    ("base_train", "--depth 2 --data-dir nowhere", "", "", "nowhere does not exist: download some"),
    ("primer", "--data-dir file", "", "", "file is a file, where a folder is needed: choose another folder"),
    ("tok_train", "--tokenizer-dir file", "", "", "file is a file, where a folder is needed: choose another folder"),
    ("tok_train", "--tokenizer-dir file/below", "", "", "file is a file, where a folder is needed"),
    ("tok_eval", "--tokenizer-dir file", "", "", "file is a file: name the folder of a tokenizer"),
    ("base_eval", "--eval core --eval-bundle file --device cpu", "", "", "file has no core.yaml: pass the folder"),
    ("show_conversation", "--path .", "", "", ". is a folder, where a file is needed: name a file"),
    ("show_conversation", "--path nowhere.jsonl", "", "", "nowhere.jsonl does not exist: check the path"),
    ("export", "--out file", "", "", "file exists and is not an empty folder: choose another --out"),
    ("export", "--out file/below", "", "", "file is a file, where a folder is needed: choose another folder"),
    ("import_model", "./file -g d2", "", "", "there is no folder ./file: give a folder, or a repository"),
    (
        "speedrun",
        "",
        "NANOCHAT_DATASETS_DIR",
        "file",
        "NANOCHAT_DATASETS_DIR is file, which is not a folder: correct it",
    ),
    ("speedrun", "", "NANOCHAT_DATASETS_DIR", ".", "lacks HuggingFaceTB/smol-smoltalk: copy it there, or unset"),
    (
        "speedrun",
        "",
        "NANOCHAT_DATA_DIR",
        "nowhere",
        "NANOCHAT_DATA_DIR is nowhere, which is no folder, file or mixture",
    ),
    ("base_train", "--depth 2 --model-tag taken", "", "", "base_checkpoints/taken is a file, where a folder is needed"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory, golden_tokenizer):
    """A base folder with shards, a tokenizer, a base model and a chat model, for all mistakes."""
    folder = tmp_path_factory.mktemp("models")
    write_shards(folder / "shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        for stage in ("base", "sft"):
            save_checkpoint(tiny_gpt(initial=True), stage, tokenizer=golden_tokenizer)
        (folder / "base_checkpoints/taken").touch()
    return folder


@pytest.fixture
def user(base_dir, models, tmp_path, monkeypatch):
    """The user's current folder, with those models. Expensive work fails the test."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(models))
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(models / "shards"))
    monkeypatch.chdir(tmp_path)
    for kind, method in ((GPT, "__init__"), (Engine, "__init__"), (Tokenizer, "train")):
        monkeypatch.setattr(kind, method, lambda *args, **options: pytest.fail("expensive work came first"))
    (tmp_path / "file").touch()
    return tmp_path


def check(script, arguments, words, capsys):
    module = importlib.import_module(f"scripts.{script}")
    assert words in refusal(module, arguments.split(), capsys)


@pytest.mark.parametrize("script, arguments, words", NUMBERS, ids=lambda value: value.partition(" must ")[0][:40])
def test_number_out_of_range_ends_in_one_line(user, capsys, script, arguments, words):
    check(script, arguments, words, capsys)


@pytest.mark.parametrize("script, arguments, words", WORDS, ids=lambda value: value[:40])
def test_wrong_word_ends_in_one_line(user, capsys, script, arguments, words):
    check(script, arguments, words, capsys)


@pytest.mark.parametrize("script, arguments, variable, value, words", FOLDERS, ids=lambda value: value[:40])
def test_file_in_place_of_a_folder_ends_in_one_line(
    user, monkeypatch, capsys, script, arguments, variable, value, words
):
    if variable:
        monkeypatch.setenv(variable, value)
    check(script, arguments, words, capsys)
