"""
The lm-evaluation-harness with a tiny checkpoint and small tasks: its numbers equal those of plain forward passes.
Skipped where the harness is not installed.

    python -m pytest tests/test_lm_eval_adapter.py
"""

import json
import re
import sys

import pytest
import torch
from factories import randomize
from test_tasks_guide import chat_model  # noqa: F401  a fixture

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'nanochat[lm-eval]'")

from nanochat.eval import lm_eval_adapter  # noqa: E402
from nanochat.request import Request  # noqa: E402

DOCUMENTS = [
    {"question": "What do bees make?", "choices": ["honey", "honey and wax", "milk"], "gold": 0},
    {"question": "Two and two is", "choices": ["four", "five"], "gold": 0},
    {"question": "The sky is", "choices": ["blue", "green", "wet", "a long way up" * 9], "gold": 0},
]
TASKS = {
    "bees_choice": """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}]
""",
    "bees_text": """
output_type: loglikelihood_rolling
doc_to_target: '{{question * 20}}'
metric_list: [{metric: bits_per_byte}]
""",
    "bees_generated": """
output_type: generate_until
doc_to_target: '{{choices[0]}}'
metric_list: [{metric: exact_match}]
generation_kwargs: {until: ['e', 'th'], max_gen_toks: 12}
""",
}
DATA = """
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
doc_to_text: '{{question}}'
"""


@pytest.fixture
def folder(tmp_path):
    """Tasks for --include_path."""
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, lines in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}{DATA.replace('FILE', str(documents))}{lines}")
    return tmp_path


@pytest.fixture
def lm(chat_model):  # noqa: F811
    model = lm_eval_adapter.NanochatLM(source="sft", model_tag="d2", device="cpu", batch_size="auto")
    randomize(model.model)
    model.engine.refresh_weights()
    return model


class FakeRequest:
    def __init__(self, *args):
        self.args = args


@torch.no_grad()
def naive(lm, context, continuation):
    """Log-probability, and whether each token is the most likely one; the prompt is truncated from the left."""
    tokens = [lm.tokens.bos, *lm.tokens.encode(context + continuation)]
    start = len(lm.tokens.encode(context)) + 1
    surplus = max(0, len(tokens) - lm.model.config.sequence_len - 1)
    tokens, start = tokens[surplus:], max(start - surplus, 1)
    logprobs = lm.model(torch.tensor([tokens[:-1]]))[0].log_softmax(-1)[start - 1 :]
    targets = torch.tensor(tokens[start:])
    return logprobs.gather(1, targets[:, None]).sum().item(), bool((logprobs.argmax(-1) == targets).all())


def test_command_line_evaluates_tasks(chat_model, folder, monkeypatch, capsys):  # noqa: F811
    argv = ["--model", "nanochat", "--model_args", "source=sft,model_tag=d2", "--device", "cpu", "--batch_size", "2"]
    argv += ["--tasks", ",".join(TASKS), "--include_path", str(folder), "--output_path", str(folder / "out")]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *argv])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    lm_eval_adapter.main()
    [results] = (folder / "out").rglob("results_*.json")
    results = json.loads(results.read_text())["results"]
    assert results.keys() == TASKS.keys()
    assert results["bees_text"]["bits_per_byte,none"] > 1
    assert re.search(r"bees_choice *\|", capsys.readouterr().out)


def test_command_line_with_missing_checkpoint_is_one_line_error(chat_model, folder, monkeypatch):  # noqa: F811
    argv = ["--model", "nanochat", "--model_args", "source=sft,model_tag=d9", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *argv, "--tasks", "bees_text", "--include_path", str(folder)])
    with pytest.raises(SystemExit, match="^error: .* there are d2"):
        lm_eval_adapter.main()


def test_loglikelihood_equals_plain_forward_pass(lm):
    requests = [(d["question"], f" {choice}") for d in DOCUMENTS for choice in d["choices"]]
    requests += [("A long context. " * 20 + "Then", " this"), ("b", "ees"), ("Two", " and two is five")]
    found = lm.loglikelihood([FakeRequest(*texts) for texts in requests])
    for texts, (logprob, most_likely) in zip(requests, found, strict=True):
        expected, is_most_likely = naive(lm, *texts)
        assert logprob == pytest.approx(expected, abs=1e-3) and most_likely == is_most_likely, texts


def test_loglikelihood_without_context_of_greedy_text(lm):
    [best] = lm.engine.generate([Request([lm.tokens.bos], 3, temperature=0.0)])
    text = lm.tokens.decode(best.tokens)
    [(logprob, most_likely)] = lm.loglikelihood([FakeRequest("", text)])
    assert most_likely == (lm.tokens.encode(text) == best.tokens)
    assert logprob == pytest.approx(naive(lm, "", text)[0], abs=1e-3)


def test_loglikelihood_rolling_scores_long_text_in_pieces(lm):
    text = "Bees make honey, and the sky is blue. " * 12
    ids, context = lm.tokens.encode(text), lm.model.config.sequence_len
    assert len(ids) > 2 * context
    total, read = 0.0, [lm.tokens.bos, *ids]
    with torch.no_grad():
        for first in range(0, len(ids), context):
            last = min(first + context, len(ids))
            start = max(0, last - context) if first else 0  # the last piece reads a full context
            logprobs = lm.model(torch.tensor([read[start:last]]))[0].log_softmax(-1)[first - start :]
            total += logprobs.gather(1, torch.tensor(ids[first:last])[:, None]).sum().item()
    assert lm.loglikelihood_rolling([FakeRequest(text), FakeRequest("")]) == [pytest.approx(total, abs=1e-2), 0.0]


def test_generate_until_ends_before_stop_string(lm):
    settings = {"until": [], "max_gen_toks": 16}
    plain = lm.generate_until([FakeRequest("The sky is", settings)])[0]
    stop = plain[len(plain) // 2 :][:2]
    requests = [FakeRequest("The sky is", settings | {"until": until}) for until in ([stop], ["~~~", stop], stop)]
    assert lm.generate_until(requests) == [plain[: plain.index(stop)]] * 3
    sampled = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8, "top_k": 40}
    assert len(set(lm.generate_until([FakeRequest("The sky is " * 60, sampled)] * 8))) > 4
