"""
CORE: prompts and positions as published, trees of rows against one row at a time, ranks, the bundle, the results.

    python -m pytest tests/test_core_eval.py
    NANOCHAT_EVAL_BUNDLE=~/eval_bundle python -m pytest tests/test_core_eval.py     # and all 22 real tasks
"""

import csv
import io
import json
import os
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, golden
from factories import FAMILY
from file_server import running

from nanochat.common import UserError
from nanochat.distributed import Dist
from nanochat.eval import core as core_eval
from nanochat.eval import core_tasks
from nanochat.eval.core import TaskScore, batches, core_metric, evaluate_core, grow, judge, save_scores, score
from nanochat.eval.core_tasks import (
    CoreTask,
    Row,
    common_prefix,
    cut,
    load_tasks,
    locate,
    render,
    resolve_bundle,
    tokenize,
)
from nanochat.gpt import GPT, GPTConfig
from scripts import base_eval
from scripts.bench import core as bench_core

CPU = Dist(torch.device("cpu"))
WORDS = "the cat sat on a mat and saw one old dog run by it in the sun while 12 birds sang of 345 ways home".split()


def text(rng, low, high):
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def make_rows(kind, number, seed=0):
    """Items of many lengths; some choices are one word, some begin another one, some are the same."""
    rng = random.Random(seed)
    rows = []
    for i in range(number):
        if kind == "multiple_choice":
            choices = [text(rng, 1, (1, 9)[i % 2]) for _ in range(2 + i % 3)]
            choices[-1] = (choices[-1], f"{choices[0]} again", choices[0])[i % 3]
            rows.append({"query": text(rng, 3, 30), "choices": choices, "gold": rng.randrange(len(choices))})
        elif kind == "schema":
            beginning = text(rng, 0, 20)
            contexts = [f"{beginning} {text(rng, 1, 4)}" for _ in range(2)]
            rows.append({"context_options": contexts, "continuation": text(rng, 1, 8), "gold": rng.randrange(2)})
        else:
            rows.append({"context": text(rng, 3, 30) + " " * (i % 2), "continuation": text(rng, 1, 2)})
    return rows


def make_tasks(number=7, num_fewshot=2):
    return [
        CoreTask(f"{kind}{shots}", kind, shots, delimiter, 0.25, make_rows(kind, number))
        for kind in core_tasks.FIELDS
        for shots, delimiter in ((0, " "), (num_fewshot, "\nAnswer: "))
    ]


def make_model(tokenizer, **config):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{"sequence_len": 512, "vocab_size": tokenizer.vocab_size, "n_embd": 32} | config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def all_items(tasks):
    return [(task, index) for task in tasks for index in range(len(task))]


@torch.no_grad()
def loss_and_hits(model, row):
    """One row alone, and the whole of its logits."""
    logits = model(torch.tensor([row.tokens]))[0, row.start - 1 : row.stop - 1]
    targets = torch.tensor(row.tokens[row.start : row.stop])
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
def test_golden_prompts_and_positions(cases, golden_tokenizer, number):
    case = cases["tasks"][number]
    task = golden_task(case)
    for index, expected in enumerate(case["rendered"]):
        prompts = render(task, index)
        assert prompts == expected["prompts"]
        rows = locate(task.kind, [[golden_tokenizer.bos, *golden_tokenizer.encode(prompt)] for prompt in prompts])
        assert [row.start for row in rows] == expected["starts"]
        assert [row.stop for row in rows] == expected["ends"]


@pytest.mark.parametrize("max_columns", [1, 300, 4096])
def test_golden_verdicts(cases, golden_model, golden_tokenizer, max_columns):
    items = [(golden_task(case), index) for case in cases["tasks"] for index in range(len(case["data"]))]
    expected = [verdict for case in cases["tasks"] for verdict in case["correct"]]
    assert judge(golden_model, golden_tokenizer, items, max_columns) == expected


# ---- from an item to its rows ----


def test_few_shot_examples_are_those_of_a_list_of_the_others():
    rows = [{"context": f"<{i}>", "continuation": "x"} for i in range(20)]
    task = CoreTask("", "language_modeling", 5, " ", 0.0, rows)
    for index in (0, 7, 19):
        others = [i for i in range(20) if i != index]
        expected = [*random.Random(1234 + index).sample(others, 5), index]
        assert render(task, index)[1] == "\n\n".join(f"<{i}> x" for i in expected)


def test_common_prefix():
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert common_prefix([[1], [2]]) == 0
    assert common_prefix([[5, 6]]) == 2


def test_each_row_has_something_to_score():
    # A choice that begins another one; contexts of which one ends the other; one that merges with it.
    assert [row.start for row in locate("multiple_choice", [[0, 1, 2], [0, 1, 2, 3]])] == [2, 2]
    assert [row.start for row in locate("schema", [[0, 1, 2], [9, 0, 1, 2]])] == [1, 2]
    assert locate("language_modeling", [[0, 1, 2], [0, 1, 7, 8]]) == [Row([0, 1, 7, 8], 2, 4)]


def test_a_row_is_cut_at_the_left():
    row = Row([0, 1, 2, 3, 4, 5], 4, 6)
    assert cut(row, 6) == row
    assert cut(row, 4) == Row([2, 3, 4, 5], 2, 4)
    assert cut(row, 2) == Row([4, 5], 1, 2)  # nothing predicts the first


def test_a_choice_said_twice_can_be_right_once(golden_tokenizer):
    rows = [{"query": "a", "choices": ["b", "c", "b"], "gold": 2}]
    [of_item] = tokenize(golden_tokenizer, [(CoreTask("", "multiple_choice", 0, " ", 0.0, rows), 0)], 64)
    assert list(of_item) == [0, 1]


# ---- trees ----


def test_what_rows_share_is_computed_once():
    beginning = list(range(20))
    [tree] = grow(0, {0: Row([*beginning, 31, 32, 33], 20, 23), 1: Row([*beginning, 41], 20, 21)})
    assert tree.trunk == beginning
    assert tree.branches == [[19, 31, 32], []]
    one, other = grow(0, {0: Row([1, 2, 3], 1, 3), 1: Row([7, 8, 9, 4], 1, 4)})  # cut rows may share nothing
    assert (one.trunk, other.trunk, one.branches) == ([1, 2], [7, 8, 9], [[]])


def test_batches_keep_to_their_size_and_lose_nothing(golden_tokenizer):
    rows = tokenize(golden_tokenizer, all_items(make_tasks(30)), 200)
    trees = [tree for item, of_item in enumerate(rows) for tree in grow(item, of_item)]
    found = []
    for batch in batches(trees, 600):
        columns = max(len(tree.trunk) for tree in batch) + max(tree.branch_columns for tree in batch)
        assert len(batch) == 1 or len(batch) * columns <= 600
        found.extend(batch)
    assert sorted((tree.item, *tree.rows) for tree in found) == sorted((tree.item, *tree.rows) for tree in trees)


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
def test_trees_equal_one_row_at_a_time(golden_tokenizer, config, max_columns):
    model = make_model(golden_tokenizer, **config)
    items = all_items(make_tasks(num_fewshot=4))
    rows = list(tokenize(golden_tokenizer, items, model.config.sequence_len))
    longest = max(len(row.tokens) for of_item in rows for row in of_item.values())
    assert longest > 130 or longest == model.config.sequence_len  # longer than the short window, which is 128
    trees = [tree for item, of_item in enumerate(rows) for tree in grow(item, of_item)]
    with torch.inference_mode():
        scored = {(item, choice): s for batch in batches(trees, max_columns) for item, choice, s in score(model, batch)}
    expected = {
        (i, choice): loss_and_hits(model, row) for i, of_item in enumerate(rows) for choice, row in of_item.items()
    }
    assert scored.keys() == expected.keys()
    for name, (loss, hits) in expected.items():
        assert scored[name].loss == pytest.approx(loss, abs=1e-4)
        assert scored[name].all_likeliest == hits
    verdicts = judge(model, golden_tokenizer, items, max_columns)
    assert verdicts == [bench_core.judge_alone(model, golden_tokenizer, item) for item in items]
    assert 0 < sum(verdicts) < len(items)


def test_real_tasks_have_the_same_verdicts_one_at_a_time(golden_model, golden_tokenizer):
    bundle = os.environ.get("NANOCHAT_EVAL_BUNDLE")
    if not bundle:
        pytest.skip("set NANOCHAT_EVAL_BUNDLE to the folder of the evaluation bundle")
    tasks = load_tasks(Path(bundle), 12)
    assert len(tasks) == 22
    items = [(task, index) for task in tasks for index in range(3)]
    expected = [bench_core.judge_alone(golden_model, golden_tokenizer, item) for item in items]
    assert judge(golden_model, golden_tokenizer, items) == expected


# ---- ranks ----


class Rank(Dist):
    """One of several ranks, whose sums are its own part."""

    def sum(self, tensor):
        return tensor


@pytest.mark.parametrize("world_size", [2, 50])  # 50: some have nothing to do
def test_the_ranks_parts_add_up(golden_tokenizer, monkeypatch, world_size):
    monkeypatch.setattr(core_eval, "WINDOW", 5)
    model, tasks = make_model(golden_tokenizer, n_layer=2, n_head=2, n_kv_head=2), make_tasks()
    told = []
    whole = evaluate_core(model, golden_tokenizer, tasks, CPU, progress=told.append)
    assert told == [5, 10, 15, 20, 25, 30, 35, 40, 42]
    parts = [evaluate_core(model, golden_tokenizer, tasks, Rank(CPU.device, r, world_size)) for r in range(world_size)]
    assert [s.correct for s in whole] == [sum(part[i].correct for part in parts) for i in range(len(tasks))]
    assert 0 < sum(s.correct for s in whole) < sum(s.total for s in whole)


# ---- the bundle ----


def write_bundle(folder, number=6, num_fewshot=2):
    (folder / "eval_data/some").mkdir(parents=True)
    entries = []
    for kind in core_tasks.FIELDS:
        lines = [json.dumps(row, ensure_ascii=False) for row in make_rows(kind, number)]
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


def test_tasks_of_a_bundle(bundle):
    tasks = load_tasks(bundle)
    assert [task.label for task in tasks] == ["my_multiple_choice", "my_schema", "my_language_modeling"]
    assert [task.baseline for task in tasks] == [0.25, 0.25, 0.0]
    assert [task.delimiter for task in tasks] == [" ", " ", "\nA: "]
    rows = make_rows("schema", 6)
    random.Random(1337).shuffle(rows)
    assert tasks[1].rows == rows
    assert load_tasks(bundle, 4)[1].rows == rows[:4]


def test_fewer_items_than_shots(bundle):
    with pytest.raises(
        UserError, match="my_multiple_choice shows 2 other items before each, so it needs 3 items and has 2"
    ):
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
        (no_baseline, "has no baseline"),
        (line_cut_short, "damaged.*fetch the bundle anew"),
        (empty_list, "damaged.*fetch the bundle anew"),
    ],
)
def test_a_bundle_that_lacks_something(bundle, spoil, words):
    spoil(bundle)
    with pytest.raises(UserError, match=words):
        load_tasks(bundle)


def test_where_the_bundle_is(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_EVAL_BUNDLE", str(bundle))
    assert resolve_bundle() == bundle
    with pytest.raises(UserError, match="no core.yaml.*--eval-bundle"):
        resolve_bundle(str(tmp_path))


def test_the_bundle_is_fetched_once_and_anew_if_it_was_no_archive(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_EVAL_BUNDLE", raising=False)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as contents:
        contents.writestr("__MACOSX/._eval_bundle", "")
        for path in [bundle, *bundle.rglob("*")]:
            contents.write(path, Path("eval_bundle") / path.relative_to(bundle))
    with running() as server:
        for broken in (b"this is no archive", archive.getvalue()[:-9], empty_archive()):
            server.files["/b.zip"] = broken
            with pytest.raises(UserError, match="run the same command again"):
                resolve_bundle(url=f"{server.url}/b.zip")
            assert list((tmp_path / "base").iterdir()) == []
        server.files["/b.zip"] = archive.getvalue()
        path = resolve_bundle(url=f"{server.url}/b.zip")
        gets = len(server.gets("/b.zip"))
        assert resolve_bundle(url=f"{server.url}/b.zip") == path and len(server.gets("/b.zip")) == gets
    assert [p.name for p in (tmp_path / "base").iterdir()] == ["eval_bundle"]
    assert load_tasks(path) == load_tasks(bundle)


def empty_archive():
    archive = io.BytesIO()
    zipfile.ZipFile(archive, "w").close()
    return archive.getvalue()


# ---- results ----


def test_centered_scores_and_core():
    scores = [TaskScore("a", 50, 100, 0.25), TaskScore("b", 10, 100, 0.0)]
    assert [s.centered for s in scores] == pytest.approx([1 / 3, 0.1])
    assert scores[0].interval == pytest.approx((0.40383, 0.59617), abs=1e-4)  # Wilson's
    core, margin = core_metric(scores)
    assert core == pytest.approx((1 / 3 + 0.1) / 2)
    half_widths = [0.19234 / 2 / 0.75, (0.17437 - 0.05523) / 2]
    assert margin == pytest.approx((half_widths[0] ** 2 + half_widths[1] ** 2) ** 0.5 / 2, abs=1e-4)


def test_scores_are_kept(tmp_path):
    scores = [TaskScore("a", 1, 4, 0.25), TaskScore("b", 4, 4, 0.5)]
    save_scores(tmp_path / "new/d4-000100", scores, "d4")
    table = list(csv.DictReader((tmp_path / "new/d4-000100.csv").open()))
    assert [row["task"] for row in table] == ["a", "b", "CORE"]
    assert [float(row["centered"]) for row in table] == [0.0, 1.0, 0.5]
    summary = json.loads((tmp_path / "new/d4-000100.json").read_text())
    assert (summary["CORE"], summary["model"]) == (0.5, "d4")
    assert summary["tasks"]["b"]["correct"] == 4 and 0 < summary["tasks"]["b"]["interval"][0] < 1


# ---- through the command line ----


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A base folder with a small model as people have it."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_DTYPE", raising=False)
    shutil.copytree(GOLDEN / "checkpoint/modern", tmp_path / "base/base_checkpoints/small")
    shutil.copytree(GOLDEN / "tokenizer", tmp_path / "base/tokenizer")
    return tmp_path / "base"


def test_base_eval_core(place, bundle, capsys):
    argv = ["--device", "cpu", "--eval", "core", "--eval-bundle", str(bundle), "--max-per-task", "5"]
    numbers = base_eval.main(argv)
    out = capsys.readouterr().out
    assert "my_schema" in out and "GPT-2 XL (1.5B)" in out and "0.2565" in out and "15 items in" in out
    step = json.loads((GOLDEN / "checkpoint/modern/expected.json").read_text())["step"]
    summary = json.loads((place / f"base_eval/base-small-{step:06d}-5.json").read_text())
    assert numbers == {"CORE": summary["CORE"], "CORE ±": summary["margin"]}
    assert json.loads((place / "report/base_eval.json").read_text())["CORE"] == summary["CORE"]
    assert base_eval.main(argv) == numbers  # the same items every time


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--eval", "cor"], "there are core, bpb, sample"),
        (["--eval", "core", "--max-per-task", "0"], "at least 1"),
        (["--eval", "core", "--max-per-task", "2"], "needs 3 items and has 2: raise --max-per-task"),
        (["--eval", "core", "--eval-bundle", "nowhere"], "no core.yaml"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_built(place, bundle, monkeypatch, argv, words):
    monkeypatch.setenv("NANOCHAT_EVAL_BUNDLE", str(bundle))
    monkeypatch.setattr(GPT, "__init__", lambda *args: pytest.fail("a model was built first"))
    with pytest.raises(SystemExit, match=words):
        base_eval.main(["--device", "cpu", *argv])
