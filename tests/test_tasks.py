"""
Tasks: datasets from a local mirror and from a hub, items, grading.

    python -m pytest tests/test_tasks.py
    NANOCHAT_DATASETS_DIR=… python -m pytest tests/test_tasks.py    # with the real datasets of a local mirror
"""

import json
import os
import random
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from file_server import running

from nanochat.common import UserError
from tasks import hub
from tasks.arc import ARC
from tasks.common import Task, TaskMixture, final_number, limited
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K, solution_parts
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk

ROOT = Path(__file__).resolve().parent.parent
ARC_ROWS = [
    {"id": "a", "question": "Wet?", "choices": {"text": ["water", "sand"], "label": ["A", "B"]}, "answerKey": "A"},
    {"id": "b", "question": "Dry?", "choices": {"text": ["water", "sand"], "label": ["1", "2"]}, "answerKey": "2"},
]
MMLU_ROWS = [{"question": "2+2?", "subject": "arithmetic", "choices": ["1", "2", "3", "4"], "answer": 3}]
GSM8K_ROWS = [
    {"question": f"{i} and 1,000?", "answer": f"It is {i}+1000=<<{i}+1000={i + 1000}>>{i + 1000}.\n#### 1,{i:03d}"}
    for i in range(100)
]
TALK_ROWS = [
    {"messages": [{"role": role, "content": role} for role in ("system", "user", "assistant")], "source": "x"},
    {"messages": [{"role": "assistant", "content": "first"}], "source": "x"},
]


def write_dataset(root, repo, config, splits):
    """Writes a dataset in the layout of the hub: parquet files, and a README whose front matter lists them."""
    folder = root / repo
    (folder / config).mkdir(parents=True)
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split, rows in splits.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / config / f"{split}.parquet")
        lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def write_datasets(root):
    write_dataset(root, "allenai/ai2_arc", "ARC-Easy", {"test": ARC_ROWS})
    write_dataset(root, "cais/mmlu", "all", {"test": MMLU_ROWS, "auxiliary_train": MMLU_ROWS})
    write_dataset(root, "openai/gsm8k", "main", {"train": GSM8K_ROWS})
    write_dataset(root, "HuggingFaceTB/smol-smoltalk", "default", {"train": TALK_ROWS})


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    write_datasets(tmp_path / "mirror")
    monkeypatch.setenv("NANOCHAT_DATASETS_DIR", str(tmp_path / "mirror"))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "mirror"


def test_arc_item_has_rendered_question_and_letters(mirror):
    task = ARC("ARC-Easy", "test")
    assert len(task) == 2 and task.kind == "categorical"
    dry = next(conversation for conversation in task if "Dry" in conversation["messages"][0]["content"])
    assert dry["letters"] == ["1", "2"]
    assert dry["messages"] == [
        {
            "role": "user",
            "content": "Multiple Choice question: Dry?\n- water=1\n- sand=2\n\n"
            "Respond only with the letter of the correct answer.",
        },
        {"role": "assistant", "content": "2"},
    ]


def test_mmlu_item_has_rendered_question_and_subject(mirror):
    [conversation] = MMLU("auxiliary_train")
    assert conversation["letters"] == ["A", "B", "C", "D"] and conversation["subject"] == "arithmetic"
    question, answer = (message["content"] for message in conversation["messages"])
    assert question.startswith("Multiple Choice question: 2+2?\n- 1=A\n- 2=B\n- 3=C\n- 4=D\n\n") and answer == "D"


def test_gsm8k_annotations_become_tool_calls():
    assert solution_parts("He has 2 * 3 = <<2*3=6>>6 eggs.\n#### 6") == [
        {"type": "text", "text": "He has 2 * 3 = "},
        {"type": "python", "text": "2*3"},
        {"type": "python_output", "text": "6"},
        {"type": "text", "text": "6 eggs.\n#### 6"},
    ]
    assert [part["type"] for part in solution_parts("<<1+1=2>><<2+1=3>>")] == ["python", "python_output"] * 2
    assert solution_parts("None.\n#### 0") == [{"type": "text", "text": "None.\n#### 0"}]


def test_gsm8k_grades_the_number_after_the_hashes(mirror):
    task = GSM8K("train")
    conversation = next(c for c in task if c["messages"][0]["content"].startswith("7 "))
    assert conversation["answer"] == "1007"
    for completion in ("#### 1007", "so\n#### 1,007", "####1007.0", "#### $1,007.", "#### 1007 #### 3"):
        assert task.is_correct(conversation, completion), completion
    for completion in ("", "1007", "#### ", "#### x1007", "#### 10070", "#### -1007", "#### 1007.5"):
        assert not task.is_correct(conversation, completion), completion
    assert [task.reward(conversation, text) for text in ("#### 1007", "#### 1")] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "number"), [("#### -5", "-5"), ("#### $-5", "-5"), ("#### -$5", "-5"), ("#### .5", "0.5"), ("#### 5", "5")]
)
def test_final_number_accepts_signs_and_currency(text, number):
    assert final_number(text) == Decimal(number)


def test_rows_are_shuffled_with_a_fixed_seed(mirror):
    questions = [[conversation["messages"][0]["content"] for conversation in GSM8K("train")] for _ in range(2)]
    in_order = [row["question"] for row in GSM8K_ROWS]
    assert questions[0] == questions[1] != in_order and sorted(questions[0]) == sorted(in_order)


def test_smoltalk_invalid_row_raises_when_read(mirror):
    task = SmolTalk("train")
    assert len(task) == 2
    rows, errors = [], []
    for i in range(2):
        try:
            rows.append(task[i])
        except UserError as error:
            errors.append(error)
    assert rows == [{"messages": TALK_ROWS[0]["messages"]}] and len(errors) == 1


def test_custom_json_reads_one_conversation_per_line(tmp_path):
    path = tmp_path / "mine.jsonl"
    talk = [{"role": "user", "content": "Hi\u2028there"}, {"role": "assistant", "content": "Ho"}]
    path.write_text(json.dumps(talk, ensure_ascii=False) + "\n\n" + json.dumps(talk) + "\n", encoding="utf-8")
    task = CustomJSON(path)
    assert list(task) == [{"messages": talk}] * 2 and task.kind == "conversations"


@pytest.mark.parametrize(
    "bad", ["{", '"text"', "{}", '[{"role": "user"}]', '[{"role": "assistant", "content": "I first"}]', "[]", "3"]
)
def test_custom_json_invalid_line_is_named(tmp_path, bad):
    path = tmp_path / "mine.jsonl"
    path.write_text('[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]\n' + bad)
    with pytest.raises(UserError, match="mine.jsonl, line 2: "):
        CustomJSON(str(path))


def test_custom_json_unreadable_file_is_named(tmp_path):
    (tmp_path / "latin").write_bytes(b"\xe9")
    (tmp_path / "empty").write_text("\n")
    for name in ("missing", "latin", "empty"):
        with pytest.raises(UserError, match=name):
            CustomJSON(tmp_path / name)


class Numbers(Task):
    kind = "generative"

    def __init__(self, start, stop):
        self.rows = range(start, stop)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"messages": [], "number": self.rows[index]}

    def is_correct(self, conversation, completion):
        return completion == str(conversation["number"])


def test_task_mixture_has_every_item_in_a_fixed_order():
    once, twice = Numbers(0, 50), Numbers(100, 120)
    order = [row["number"] for row in TaskMixture([once, twice, twice])]
    assert sorted(order) == sorted([*range(50), *range(100, 120), *range(100, 120)]) != order
    assert order == [row["number"] for row in TaskMixture([once, twice, twice])]
    assert order != [row["number"] for row in TaskMixture([once, twice, twice], seed=43)]


def test_limited_returns_the_first_items():
    task = Numbers(0, 10)
    assert [row["number"] for row in limited(task, 3)] == [0, 1, 2] and len(limited(task, 3)) == 3
    assert limited(task, -1) is task and limited(task, 10) is task
    assert limited(task, 3).kind == "generative" and limited(task, 3).reward({"number": 1}, "1") == 1.0
    assert len(limited(task, 0)) == 0


@pytest.mark.parametrize(
    ("config", "split", "message"),
    [("main", "test", r"Unknown split .test.*train"), ("other", "train", ".other. not found.*main")],
)
def test_hub_load_unknown_config_or_split_raises(mirror, config, split, message):
    with pytest.raises(UserError, match=message):
        hub.load("openai/gsm8k", config, split)


def test_hub_load_damaged_mirror_raises(mirror):
    (mirror / "openai/gsm8k/main/train.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="gsm8k, config main, split train cannot be loaded"):
        hub.load("openai/gsm8k", "main", "train")


def run_python(code, **environment):
    """Runs code in a separate process, because huggingface_hub reads its environment when it is imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "NANOCHAT_"))} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_hub_load_from_a_server_is_cached_for_offline_use(tmp_path):
    write_datasets(tmp_path / "mirror")
    code = "from tasks.gsm8k import GSM8K; task = GSM8K('train'); print(len(task), task[0]['messages'][0]['content'])"
    environment = {
        "NANOCHAT_BASE_DIR": str(tmp_path / "base"),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
    }
    with running() as server:
        server.add_dataset("openai/gsm8k", tmp_path / "mirror" / "openai" / "gsm8k")
        online = run_python(code, HF_ENDPOINT=server.url, **environment)
    assert online.returncode == 0 and online.stdout.startswith("100 "), online.stderr
    assert "Generating" not in online.stderr
    offline = run_python(code, HF_HUB_OFFLINE="1", **environment)
    assert offline.stdout == online.stdout, offline.stderr  # from the cache


@pytest.mark.slow
def test_hub_load_offline_without_mirror_names_the_remedy(tmp_path):
    code = "from tasks.gsm8k import GSM8K; GSM8K('train')"
    environment = {"NANOCHAT_BASE_DIR": str(tmp_path / "base"), "HF_HOME": str(tmp_path / "hf")}
    result = run_python(code, HF_HUB_OFFLINE="1", **environment)
    assert "openai/gsm8k cannot be reached" in result.stderr and "NANOCHAT_DATASETS_DIR" in result.stderr


def test_dataset_missing_in_the_mirror_is_not_downloaded(mirror, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: pytest.fail("it was loaded from the hub"))
    shutil.rmtree(mirror / "openai")
    with pytest.raises(UserError, match="lacks openai/gsm8k: copy it there, or unset the variable"):
        GSM8K("train")


REAL = {
    "arc": [(ARC, ("ARC-Easy", "test"), 2376), (ARC, ("ARC-Challenge", "test"), 1172)],
    "mmlu": [(MMLU, ("test",), 14042), (MMLU, ("validation",), 1531)],
    "gsm8k": [(GSM8K, ("train",), 7473), (GSM8K, ("test",), 1319)],
}


@pytest.mark.skipif("NANOCHAT_DATASETS_DIR" not in os.environ, reason="NANOCHAT_DATASETS_DIR is not set")
@pytest.mark.parametrize("name", REAL)
def test_real_datasets_have_correct_references(name, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    for cls, args, num_rows in REAL[name]:
        task = cls(*args)
        assert len(task) == num_rows
        for index in random.Random(0).sample(range(num_rows), 200):
            conversation = task[index]
            answer = conversation["messages"][-1]["content"]
            if task.kind == "categorical":
                assert answer in conversation["letters"]
            else:
                assert task.is_correct(conversation, "".join(part["text"] for part in answer))
