"""
CORE: prompts and positions as published, prefix sharing against one prompt at a time, ranks, the bundle, the results.

    python -m pytest tests/test_core_eval.py
    NANOCHAT_EVAL_BUNDLE=~/eval_bundle python -m pytest tests/test_core_eval.py     # with all 22 tasks
"""

import csv
import io
import json
import os
import random
import shutil
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, golden
from factories import FAMILY, random_text, tiny_gpt
from file_server import Fault, running

from nanochat.common import UserError
from nanochat.distributed import Dist
from nanochat.eval import core as core_eval
from nanochat.eval import core_tasks
from nanochat.eval.core import (
    TaskScore,
    batch_trees,
    build_prefix_trees,
    core_metric,
    evaluate_core,
    grade_items,
    save_scores,
    score_trees,
)
from nanochat.eval.core_tasks import (
    CoreTask,
    ScoredPrompt,
    common_prefix_length,
    load_tasks,
    locate_scored_tokens,
    render_prompts,
    resolve_bundle,
    tokenize_items,
    truncate_left,
)
from nanochat.gpt import GPT, GPTConfig
from scripts import base_eval
from scripts.bench import core as bench_core

CPU = Dist(torch.device("cpu"))


def make_items(kind, number, seed=0):
    """Items of many lengths; some choices are one word, some are the beginning of another, some are equal."""
    rng = random.Random(seed)
    items = []
    for i in range(number):
        if kind == "multiple_choice":
            choices = [random_text(rng, 1, (1, 9)[i % 2]) for _ in range(2 + i % 3)]
            choices[-1] = (choices[-1], f"{choices[0]} again", choices[0])[i % 3]
            items.append({"query": random_text(rng, 3, 30), "choices": choices, "gold": rng.randrange(len(choices))})
        elif kind == "schema":
            beginning = random_text(rng, 0, 20)
            contexts = [f"{beginning} {random_text(rng, 1, 4)}" for _ in range(2)]
            items.append(
                {"context_options": contexts, "continuation": random_text(rng, 1, 8), "gold": rng.randrange(2)}
            )
        else:
            items.append({"context": random_text(rng, 3, 30) + " " * (i % 2), "continuation": random_text(rng, 1, 2)})
    return items


def make_tasks(number=7, num_fewshot=2):
    return [
        CoreTask(f"{kind}{shots}", kind, shots, delimiter, 0.25, make_items(kind, number))
        for kind in core_tasks.FIELDS
        for shots, delimiter in ((0, " "), (num_fewshot, "\nAnswer: "))
    ]


def make_model(**config):
    return tiny_gpt(**{"sequence_len": 512} | config).eval()


def all_items(tasks):
    return [(task, index) for task in tasks for index in range(len(task))]


@torch.no_grad()
def loss_and_hits(model, prompt):
    """One prompt alone, with all of its logits."""
    logits = model(torch.tensor([prompt.tokens]))[0, prompt.start - 1 : prompt.stop - 1]
    targets = torch.tensor(prompt.tokens[prompt.start : prompt.stop])
    return F.cross_entropy(logits, targets).item(), bool((logits.argmax(-1) == targets).all())


# ---- the golden cases ----


@pytest.fixture(scope="module")
def cases():
    return json.loads(golden("core/cases.json").read_text())


@pytest.fixture(scope="module")
def golden_model(cases):
    model = GPT(GPTConfig(**cases["model"]["config"]))
    model.load_state_dict(torch.load(golden("core/model.pt"), weights_only=True))
    return model.eval()


def golden_task(case):
    meta = case["meta"]
    return CoreTask("", meta["task_type"], meta["num_fewshot"], meta["continuation_delimiter"], 0.0, case["data"])


@pytest.mark.parametrize("number", range(6))
def test_render_prompts_equals_golden_prompts(cases, golden_tokenizer, number):
    case = cases["tasks"][number]
    task = golden_task(case)
    for index, expected in enumerate(case["rendered"]):
        prompts = render_prompts(task, index)
        assert prompts == expected["prompts"]
        tokens = [[golden_tokenizer.bos, *golden_tokenizer.encode(prompt)] for prompt in prompts]
        scored = locate_scored_tokens(task.kind, tokens)
        assert [prompt.start for prompt in scored] == expected["starts"]
        assert [prompt.stop for prompt in scored] == expected["ends"]


@pytest.mark.parametrize("max_columns", [1, 300, 4096])
def test_grade_items_equals_golden_verdicts(cases, golden_model, golden_tokenizer, max_columns):
    items = [(golden_task(case), index) for case in cases["tasks"] for index in range(len(case["data"]))]
    expected = [verdict for case in cases["tasks"] for verdict in case["correct"]]
    assert grade_items(golden_model, golden_tokenizer, items, max_columns=max_columns) == expected


# ---- from an item to its prompts ----


def test_render_prompts_samples_examples_from_other_items():
    items = [{"context": f"<{i}>", "continuation": "x"} for i in range(20)]
    task = CoreTask("", "language_modeling", 5, " ", 0.0, items)
    for index in (0, 7, 19):
        others = [i for i in range(20) if i != index]
        expected = [*random.Random(1234 + index).sample(others, 5), index]
        assert render_prompts(task, index)[1] == "\n\n".join(f"<{i}> x" for i in expected)


def test_common_prefix_length_of_sequences():
    assert common_prefix_length([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert common_prefix_length([[1], [2]]) == 0
    assert common_prefix_length([[5, 6]]) == 2


def test_locate_scored_tokens_scores_at_least_one_token():
    # A choice that is the beginning of another; a context that is the end of another; a continuation that merges.
    choices = locate_scored_tokens("multiple_choice", [[0, 1, 2], [0, 1, 2, 3]])
    assert [prompt.start for prompt in choices] == [2, 2]
    contexts = locate_scored_tokens("schema", [[0, 1, 2], [9, 0, 1, 2]])
    assert [prompt.start for prompt in contexts] == [1, 2]
    [merged] = locate_scored_tokens("language_modeling", [[0, 1, 2], [0, 1, 7, 8]])
    assert merged == ScoredPrompt([0, 1, 7, 8], 2, 4)


def test_truncate_left_drops_the_beginning():
    prompt = ScoredPrompt([0, 1, 2, 3, 4, 5], 4, 6)
    assert truncate_left(prompt, 6) == prompt
    assert truncate_left(prompt, 4) == ScoredPrompt([2, 3, 4, 5], 2, 4)
    assert truncate_left(prompt, 2) == ScoredPrompt([4, 5], 1, 2)  # the first token has no prediction


def test_tokenize_items_leaves_out_repeated_choices(golden_tokenizer):
    items = [{"query": "a", "choices": ["b", "c", "b"], "gold": 2}]
    task = CoreTask("", "multiple_choice", 0, " ", 0.0, items)
    [prompts] = tokenize_items(golden_tokenizer, [(task, 0)], 64)
    assert list(prompts) == [0, 1]


# ---- prefix sharing ----


def all_trees(items):
    return [tree for item, prompts in enumerate(items) for tree in build_prefix_trees(item, prompts)]


def test_build_prefix_trees_shares_the_common_prefix():
    common = list(range(20))
    several = ScoredPrompt([*common, 31, 32, 33], 20, 23)
    one_token = ScoredPrompt([*common, 41], 20, 21)
    [tree] = build_prefix_trees(0, {0: several, 1: one_token})
    assert tree.prefix == common
    assert tree.suffixes == [[19, 31, 32], []]


def test_build_prefix_trees_of_different_prompts_makes_one_tree_each():
    prompts = {0: ScoredPrompt([1, 2, 3], 1, 3), 1: ScoredPrompt([7, 8, 9, 4], 1, 4)}  # truncated ones share nothing
    one, other = build_prefix_trees(0, prompts)
    assert (one.prefix, other.prefix, one.suffixes) == ([1, 2], [7, 8, 9], [[]])


def test_batch_trees_keeps_to_max_columns_and_loses_nothing(golden_tokenizer):
    trees = all_trees(tokenize_items(golden_tokenizer, all_items(make_tasks(30)), 200))
    found = []
    for batch in batch_trees(trees, 600):
        columns = max(len(tree.prefix) for tree in batch) + max(tree.num_suffix_columns for tree in batch)
        assert len(batch) == 1 or len(batch) * columns <= 600
        found.extend(batch)
    assert sorted((tree.item, *tree.prompts) for tree in found) == sorted((tree.item, *tree.prompts) for tree in trees)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {"n_layer": 3, "n_head": 4, "n_kv_head": 2, "window_pattern": "S"},
        {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "window_pattern": "L"},
        {"n_layer": 1, "n_head": 2, "n_kv_head": 1},
        {"n_layer": 4, "n_head": 2, "n_kv_head": 2, **FAMILY["classic"]},
        {"n_layer": 3, "n_head": 2, "n_kv_head": 2, "sequence_len": 130},  # some prompts are cut
    ],
    ids=["windows", "two-layers", "one-layer", "classic", "cut"],
)
@pytest.mark.parametrize("max_columns", [1, 3000])
def test_score_trees_equals_one_prompt_at_a_time(golden_tokenizer, config, max_columns):
    model = make_model(**config)
    items = all_items(make_tasks(num_fewshot=4))
    prompts_of_items = list(tokenize_items(golden_tokenizer, items, model.config.sequence_len))
    expected = {}
    longest = 0
    for item, prompts in enumerate(prompts_of_items):
        for choice, prompt in prompts.items():
            expected[item, choice] = loss_and_hits(model, prompt)
            longest = max(longest, len(prompt.tokens))
    assert longest > 130 or longest == model.config.sequence_len  # longer than the short window, which is 128
    scores = {}
    with torch.inference_mode():
        for batch in batch_trees(all_trees(prompts_of_items), max_columns):
            for item, choice, score in score_trees(model, batch):
                scores[item, choice] = score
    assert scores.keys() == expected.keys()
    for key, (loss, all_most_likely) in expected.items():
        assert scores[key].loss == pytest.approx(loss, abs=1e-4)
        assert scores[key].all_most_likely == all_most_likely
    verdicts = grade_items(model, golden_tokenizer, items, max_columns=max_columns)
    assert verdicts == [bench_core.grade_alone(model, golden_tokenizer, item) for item in items]
    assert 0 < sum(verdicts) < len(items)


def test_grade_items_of_real_tasks_equals_one_at_a_time(golden_model, golden_tokenizer):
    bundle = os.environ.get("NANOCHAT_EVAL_BUNDLE")
    if not bundle:
        pytest.skip("set NANOCHAT_EVAL_BUNDLE to the folder of the evaluation bundle")
    tasks = load_tasks(Path(bundle), 12)
    assert len(tasks) == 22
    items = [(task, index) for task in tasks for index in range(3)]
    expected = [bench_core.grade_alone(golden_model, golden_tokenizer, item) for item in items]
    assert grade_items(golden_model, golden_tokenizer, items) == expected


# ---- ranks ----


class Rank(Dist):
    """One of several ranks; it returns its own part as the sum."""

    def sum(self, tensor):
        return tensor


@pytest.mark.parametrize("world_size", [2, 50])  # with 50, some ranks have no items
def test_evaluate_core_on_ranks_adds_up(golden_tokenizer, monkeypatch, world_size):
    monkeypatch.setattr(core_eval, "ITEMS_AT_A_TIME", 5)
    model, tasks = make_model(), make_tasks()
    reported = []
    whole = evaluate_core(model, golden_tokenizer, tasks, CPU, progress=reported.append)
    assert reported == [5, 10, 15, 20, 25, 30, 35, 40, 42]
    parts = [evaluate_core(model, golden_tokenizer, tasks, Rank(CPU.device, r, world_size)) for r in range(world_size)]
    assert [s.correct for s in whole] == [sum(part[i].correct for part in parts) for i in range(len(tasks))]
    assert 0 < sum(s.correct for s in whole) < sum(s.total for s in whole)


# ---- the bundle ----


def write_bundle(folder, number=6, num_fewshot=2):
    (folder / "eval_data/some").mkdir(parents=True)
    entries = []
    for kind in core_tasks.FIELDS:
        lines = [json.dumps(row, ensure_ascii=False) for row in make_items(kind, number)]
        (folder / f"eval_data/some/{kind}.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
        entries.append(f"- {{label: my_{kind}, dataset_uri: some/{kind}.jsonl, num_fewshot: [{num_fewshot}],")
        entries.append(f"   icl_task_type: {kind}}}")
    entries[-1] = entries[-1].replace("}", ', continuation_delimiter: "\\nA: "}')
    (folder / "core.yaml").write_text("\n".join(["icl_tasks:", *entries]))
    lines = [
        "Eval Task,Random baseline",
        *(f"my_{kind},{25 if kind != 'language_modeling' else 0}" for kind in core_tasks.FIELDS),
    ]
    (folder / "eval_meta_data.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle")


def test_load_tasks_reads_bundle(bundle):
    tasks = load_tasks(bundle)
    assert [task.label for task in tasks] == ["my_multiple_choice", "my_schema", "my_language_modeling"]
    assert [task.baseline for task in tasks] == [0.25, 0.25, 0.0]
    assert [task.delimiter for task in tasks] == [" ", " ", "\nA: "]
    rows = make_items("schema", 6)
    random.Random(1337).shuffle(rows)
    assert tasks[1].items == rows
    assert load_tasks(bundle, 4)[1].items == rows[:4]


def test_load_tasks_with_too_few_items_raises(bundle):
    with pytest.raises(UserError, match="my_multiple_choice needs 3 items, because .* but it has 2"):
        load_tasks(bundle, 2)


def lines_lack_gold(bundle):
    (bundle / "eval_data/some/schema.jsonl").write_text('{"context_options": ["a"], "continuation": "b"}\n')


def no_baseline(bundle):
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n")


def line_cut_short(bundle):
    (bundle / "eval_data/some/schema.jsonl").write_text('{"context_options": ["a"], "contin')


def empty_list(bundle):
    (bundle / "core.yaml").write_text("")


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lines_lack_gold, "lacks gold"),
        (no_baseline, "unknown kind or no baseline"),
        (line_cut_short, "damaged.*download the bundle again"),
        (empty_list, "damaged.*download the bundle again"),
    ],
)
def test_load_tasks_of_damaged_bundle_raises(bundle, spoil, words):
    spoil(bundle)
    with pytest.raises(UserError, match=words):
        load_tasks(bundle)


def test_resolve_bundle_uses_environment_variable(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_EVAL_BUNDLE", str(bundle))
    assert resolve_bundle() == bundle
    with pytest.raises(UserError, match="no core.yaml.*--eval-bundle"):
        resolve_bundle(str(tmp_path))


def test_resolve_bundle_downloads_once_and_again_if_damaged(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_EVAL_BUNDLE", raising=False)
    archive = archive_of(bundle)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with running() as server:
        for broken in (b"not an archive", archive[:-9], empty_archive()):
            server.files["/b.zip"] = broken
            with pytest.raises(UserError, match="run the same command again"):
                resolve_bundle(url=f"{server.url}/b.zip")
            assert list((tmp_path / "base").iterdir()) == []
        server.files["/b.zip"] = archive
        path = resolve_bundle(url=f"{server.url}/b.zip")
        gets = len(server.gets("/b.zip"))
        assert resolve_bundle(url=f"{server.url}/b.zip") == path and len(server.gets("/b.zip")) == gets
    assert [p.name for p in (tmp_path / "base").iterdir()] == ["eval_bundle"]
    assert load_tasks(path) == load_tasks(bundle)


FAULTS = {
    "500": Fault(status=500),
    "429 with Retry-After": Fault(status=429, headers={"Retry-After": "7"}),
    "stall": Fault(stall_at=100),
    "reset": Fault(reset_at=100),
    "a length that is too large": Fault(extra_length=10),
    "a length that is too small": Fault(extra_length=-30),
    "other content of the same length": Fault(content=b"x"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_resolve_bundle_from_a_faulty_server_tries_again(bundle, base_dir, monkeypatch, name):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(core_tasks, "DOWNLOAD_TIMEOUT", 1)
    content = archive_of(bundle)
    fault = FAULTS[name]
    if fault.content:
        fault = replace(fault, content=fault.content * len(content))
    with running() as server:
        server.files["/b.zip"] = content
        server.faults["GET /b.zip"] = [fault, fault]
        path = resolve_bundle(url=f"{server.url}/b.zip")
        has_arrived = name == "a length that is too large"  # at the first attempt
        assert len(server.gets("/b.zip")) == (1 if has_arrived else 3)
        if "Retry-After" in name:
            assert waits == [7.0, 7.0]
    assert load_tasks(path) == load_tasks(bundle)


def test_resolve_bundle_that_does_not_exist_is_not_asked_for_again(base_dir):
    with running() as server:
        with pytest.raises(UserError, match="404.*check the network"):
            resolve_bundle(url=f"{server.url}/b.zip")
        assert len(server.gets("/b.zip")) == 1


def archive_of(bundle):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as contents:
        contents.writestr("__MACOSX/._eval_bundle", "")
        for path in [bundle, *bundle.rglob("*")]:
            contents.write(path, Path("eval_bundle") / path.relative_to(bundle))
    return archive.getvalue()


def empty_archive():
    archive = io.BytesIO()
    zipfile.ZipFile(archive, "w").close()
    return archive.getvalue()


# ---- results ----


def test_core_metric_is_mean_of_centered_accuracies():
    scores = [TaskScore("a", 50, 100, 0.25), TaskScore("b", 10, 100, 0.0)]
    assert [s.centered for s in scores] == pytest.approx([1 / 3, 0.1])
    assert scores[0].interval == pytest.approx((0.40383, 0.59617), abs=1e-4)  # Wilson's
    core, margin = core_metric(scores)
    assert core == pytest.approx((1 / 3 + 0.1) / 2)
    half_widths = [0.19234 / 2 / 0.75, (0.17437 - 0.05523) / 2]
    assert margin == pytest.approx((half_widths[0] ** 2 + half_widths[1] ** 2) ** 0.5 / 2, abs=1e-4)


def test_save_scores_writes_csv_and_json(tmp_path):
    scores = [TaskScore("a", 1, 4, 0.25), TaskScore("b", 4, 4, 0.5)]
    save_scores(str(tmp_path / "new/d4-000100"), scores, "d4")
    table = list(csv.DictReader((tmp_path / "new/d4-000100.csv").open()))
    assert [row["task"] for row in table] == ["a", "b", "CORE"]
    assert [float(row["centered"]) for row in table] == [0.0, 1.0, 0.5]
    summary = json.loads((tmp_path / "new/d4-000100.json").read_text())
    assert (summary["CORE"], summary["model"]) == (0.5, "d4")
    assert summary["tasks"]["b"]["correct"] == 4 and 0 < summary["tasks"]["b"]["interval"][0] < 1


# ---- through the command line ----


@pytest.fixture
def base_folder(tmp_path, monkeypatch):
    """A base folder with a small model in the legacy checkpoint format."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_DTYPE", raising=False)
    shutil.copytree(GOLDEN / "checkpoint/modern", tmp_path / "base/base_checkpoints/small")
    shutil.copytree(GOLDEN / "tokenizer", tmp_path / "base/tokenizer")
    return tmp_path / "base"


def test_base_eval_core_prints_and_saves_scores(base_folder, bundle, capsys):
    argv = ["--device", "cpu", "--eval", "core", "--eval-bundle", str(bundle), "--max-per-task", "5"]
    numbers = base_eval.main(argv)
    out = capsys.readouterr().out
    assert "my_schema" in out and "GPT-2 XL (1.5B)" in out and "0.2565" in out and "15 items in" in out
    step = json.loads((GOLDEN / "checkpoint/modern/expected.json").read_text())["step"]
    summary = json.loads((base_folder / f"base_eval/base-small-{step:06d}-5.json").read_text())
    assert numbers == {"CORE": summary["CORE"], "CORE ±": summary["margin"]}
    assert json.loads((base_folder / "report/base_eval.json").read_text())["CORE"] == summary["CORE"]
    assert base_eval.main(argv) == numbers  # the same items every time


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--eval", "cor"], "choose among core, bpb, sample"),
        (["--eval", "core", "--max-per-task", "2"], "because .* it has 2: raise --max-per-task"),
        (["--eval", "core", "--eval-bundle", "nowhere"], "no core.yaml"),
    ],
)
def test_base_eval_invalid_flags_fail_before_model_is_built(base_folder, bundle, monkeypatch, argv, words):
    monkeypatch.setenv("NANOCHAT_EVAL_BUNDLE", str(bundle))
    monkeypatch.setattr(GPT, "__init__", lambda *args: pytest.fail("a model was built first"))
    with pytest.raises(SystemExit, match=words):
        base_eval.main(["--device", "cpu", *argv])
