"""
The report: what the reader makes of logged files, also of damaged ones; the record of sessions; report.html and
report.md; the script; the server. tests/test_report_page.py looks at the page in a browser.

    python -m pytest tests/test_report.py
"""

import importlib.util
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing
from dataclasses import dataclass

import pytest

from nanochat.cli import COUNT, Restart, command, flag
from nanochat.common import UserError
from nanochat.report import record, sessions
from nanochat.report.files import data_of, markdown, page, write_report
from nanochat.report.reader import (
    GPT2_FILE,
    MAX_POINTS,
    decimate,
    differences,
    is_number,
    read_run,
    read_samples,
    total_time,
)
from nanochat.report.record import outcome, recorded
from nanochat.report.server import ReportServer
from nanochat.report.sessions import command_line, is_running, start_time
from nanochat.train import Stopped
from scripts import report

HOSTILE = "</script><img src=x onerror=alert(1)>|`**<b>hi"


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_training(base, script="base_train", tag="d2", *, steps=10, config=None, **head):
    """The metrics file of a training stage, as logging.Logger writes it."""
    lines = [{"config": config or {"flags": {"depth": 2}}, "num_steps": 10, "device": "cpu", "world_size": 1} | head]
    for step in range(1, steps + 1):
        clock = {"step": step, "seconds": step * 1.0, "elapsed": step * 2.0, "tokens": step * 100, "flops": step * 1e6}
        lines.append(clock | {"train/loss": 5 / step, "lr/muon": 0.1, "peak_memory": 2**30})
    return write_lines(base / f"report/metrics/{script}-{tag}.jsonl", lines)


def write_sessions(base, *lines):
    return write_lines(base / "report/sessions.jsonl", lines)


def started(name="a", stage="base_train", at=1000.0, **fields):
    here = {"host": sessions.socket.gethostname(), "process": [os.getpid(), start_time(os.getpid())]}
    return (
        {"session": name, "stage": stage, "time": at, "flags": {"depth": 2}, "gpus": 0, "command": "c"} | here | fields
    )


def ended(name="a", at=1060.0, end="complete", **fields):
    return {"session": name, "end": end, "message": "", "time": at} | fields


def stage_of(run, name="base_train"):
    return next(stage for stage in run["stages"] if stage["name"] == name)


# ---- reader ----


def test_folder_without_runs_is_refused_with_the_remedy(base_dir):
    with pytest.raises(UserError, match="has no runs: train a model first"):
        read_run(base_dir)


def test_newest_run_is_read_with_the_stages_it_started_from(base_dir):
    os.utime(write_training(base_dir, tag="d4"), (1, 1))
    os.utime(write_training(base_dir, tag="d2"), (2, 2))
    parent = str(base_dir / "base_checkpoints/d4/step_000010")
    write_training(base_dir, "chat_sft", "mine", config={"base": parent, "flags": {}})
    run = read_run(base_dir)
    assert run["name"] == "mine"
    assert [(stage["name"], stage["tag"]) for stage in run["stages"]] == [("base_train", "d4"), ("chat_sft", "mine")]
    assert [stage["tag"] for stage in read_run(base_dir, "d2")["stages"]] == ["d2"]


def test_run_that_has_not_replaced_an_earlier_one_yet_is_the_newest(base_dir):
    os.utime(write_training(base_dir, steps=10), (1, 1))
    write_training(base_dir, steps=3).rename(base_dir / "report/metrics/.base_train-d2.jsonl.new")
    os.utime(write_training(base_dir, steps=10), (1, 1))
    run = read_run(base_dir)
    assert run["name"] == "d2 (new)" and stage_of(run)["step"] == 3
    assert stage_of(read_run(base_dir, "d2"))["step"] == 10


def test_unknown_tag_is_refused_with_the_known_ones(base_dir):
    write_training(base_dir)
    with pytest.raises(UserError, match="no run with the tag 'd9': its tags are d2"):
        read_run(base_dir, "d9")


def test_curves_and_axes_are_those_that_were_logged(base_dir):
    write_training(base_dir, flops_per_token=1e4)
    stage = stage_of(read_run(base_dir))
    assert set(stage["curves"]) == {"train/loss", "lr/muon", "peak_memory"}
    assert stage["curves"]["train/loss"]["step"] == [*range(1, 11)]
    assert stage["curves"]["train/loss"]["value"][:2] == [5.0, 2.5]
    assert stage["axes"]["tokens"][-1] == 1000 and stage["axes"]["flops"][-1] == 1e7
    assert stage["axes"]["hours"][-1] == pytest.approx(20 / 3600)  # elapsed, not the seconds of training alone
    assert (stage["step"], stage["num_steps"], stage["device"]) == (10, 10, "cpu")


def test_log_without_tokens_gets_them_from_the_batch_size(base_dir):
    lines = [{"config": {"settings": {"total_batch_size": 4096}}}, {"step": 3, "seconds": 0, "train/loss": 1.0}]
    write_lines(base_dir / "report/metrics/base_train-d2.jsonl", lines)
    axes = stage_of(read_run(base_dir))["axes"]
    assert axes == {"step": [3], "hours": [0.0], "tokens": [3 * 4096]}


def test_damaged_lines_are_left_out_and_named_with_the_remedy(base_dir):
    path = write_training(base_dir, steps=4)
    lines = path.read_text().splitlines()
    lines[2] = '{"step": 2, "train/'
    lines[3] = '"text"'
    path.write_text("\n".join(lines) + "\n" + '{"step": 5, "tr')  # the last line is being written: no damage
    run = read_run(base_dir)
    assert stage_of(run)["curves"]["train/loss"]["step"] == [1, 4]
    [warning] = run["warnings"]
    assert "base_train-d2.jsonl: 2 damaged lines left out, the first is line 3" in warning and "--resume" in warning


def test_metrics_file_of_garbage_is_reported_and_not_drawn(base_dir):
    path = write_training(base_dir)
    path.write_bytes(b"\xff\xfe{}\n\n[1, 2]\n" + json.dumps({"step": "x", "train/loss": 1}).encode() + b"\n")
    run = read_run(base_dir)
    assert stage_of(run)["curves"] == {} if run["stages"] else True
    assert "3 damaged lines" in run["warnings"][0]
    write_report(base_dir)


def test_only_finite_numbers_are_drawn():
    assert [value for value in (1, 0.5, True, float("nan"), float("inf"), "1", None) if is_number(value)] == [1, 0.5]


def test_decimated_curve_keeps_ends_and_spikes():
    points = [(float(i), 1.0) for i in range(100_000)]
    points[77_777] = (77_777.0, 9.0)
    kept = decimate(points, MAX_POINTS)
    assert len(kept) <= MAX_POINTS and kept == sorted(kept)
    assert kept[0] == points[0] and kept[-1] == points[-1] and points[77_777] in kept
    assert decimate(points[:5], MAX_POINTS) == points[:5]


def test_samples_are_split_into_text_and_tool_calls():
    text = "<|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>It is 42.<|assistant_end|>"
    prompt = "<|bos|><|user_start|>6*7?<|user_end|><|assistant_start|>"
    [found] = read_samples([{"step": 5, "samples": [{"prompt": prompt, "completion": text}]}, {"step": 6}])
    assert found["step"] == 5 and found["samples"][0]["prompt"] == "6*7?"
    assert [part["type"] for part in found["samples"][0]["parts"]] == ["python", "python_output", "text"]


def test_paths_are_relative_to_the_base_folder(base_dir):
    write_training(base_dir)
    model = base_dir / "base_checkpoints/d2/step_000010"
    (base_dir / "report/base_train.json").write_text(json.dumps({"model": str(model), "steps": 10}))
    run = read_run(base_dir)
    assert stage_of(run)["numbers"]["model"] == "base_checkpoints/d2/step_000010"
    assert str(base_dir) not in json.dumps(run)


def test_final_numbers_of_another_tag_are_not_shown_but_the_last_logged_ones(base_dir):
    write_training(base_dir)
    other = {"model": "/x/base_checkpoints/d9/step_000010", "steps": 7, "parameters": 123}
    (base_dir / "report/base_train.json").write_text(json.dumps(other))
    numbers = stage_of(read_run(base_dir))["numbers"]
    assert numbers["steps"] == 10 and numbers["train/loss"] == 0.5 and "parameters" not in numbers


# ---- evaluations ----


def write_core(base):
    score = {"accuracy": 0.4, "low": 0.3, "high": 0.5, "centered": 0.2, "correct": 4, "total": 10, "baseline": 0.25}
    line = {"model": "m", "stage": "base", "step": 10, "limits": ["first 10"], "numbers": {"CORE": 0.2, "CORE ±": 0.1}}
    write_lines(base / "report/metrics/base_eval-d2.jsonl", [line | {"scores": {"hellaswag": score}}])


def test_core_is_shown_beside_the_published_scores_of_gpt2(base_dir):
    write_training(base_dir)
    write_core(base_dir)
    core = read_run(base_dir)["core"]
    assert (core["core"], core["margin"], core["limits"]) == (0.2, 0.1, "first 10")
    assert core["tasks"][0]["interval"] == [pytest.approx(0.05 / 0.75), pytest.approx(0.25 / 0.75)]
    assert core["gpt2"]["centered"]["hellaswag"] == pytest.approx((0.512 - 0.25) / 0.75)
    assert len(core["gpt2"]["centered"]) == 6


def test_scores_of_gpt2_are_read_from_the_bundle_of_tasks(base_dir):
    write_training(base_dir)
    write_core(base_dir)
    (base_dir / "eval_bundle").mkdir()
    (base_dir / "eval_bundle" / GPT2_FILE).write_text("Task, Accuracy, Centered\nboolq , 0.6 , -0.05\nCORE , , 0.25\n")
    assert read_run(base_dir)["core"]["gpt2"]["centered"] == {"boolq": -0.05, "CORE": 0.25}


def test_last_evaluation_of_each_chat_model_is_shown(base_dir):
    write_training(base_dir)
    write_training(base_dir, "chat_sft", "d2", config={"base": "x/base_checkpoints/d2/step_000010"})
    line = {"model": "m1", "stage": "sft", "step": 5, "limits": [], "numbers": {}}
    lines = [
        line | {"scores": {"Sums": {"accuracy": 0.1}, "Quiz": {"accuracy": 0.5}}},
        line | {"scores": {"Sums": {"accuracy": 0.2}}},  # the same model again, one task
        line | {"stage": "rl", "scores": {"Sums": {"accuracy": 1.0}}},  # this run has no model of this stage
    ]
    write_lines(base_dir / "report/metrics/chat_eval-d2.jsonl", lines)
    [chat] = read_run(base_dir)["chat"]
    assert chat["scores"] == {"Sums": {"accuracy": 0.2}, "Quiz": {"accuracy": 0.5}}
    (base_dir / "report/metrics/chat_eval-d2.jsonl").write_text(
        "\n".join(map(json.dumps, [*lines, line | {"model": "m2", "scores": {"Sums": {"accuracy": 0.3}}}])) + "\n"
    )
    assert read_run(base_dir)["chat"][0]["scores"] == {"Sums": {"accuracy": 0.3}}


# ---- sessions ----


def test_status_is_that_of_the_last_session_and_time_that_of_all(base_dir):
    write_training(base_dir)
    first = started("a"), ended("a", 1060.0, "stopped", message="stopped by a signal")
    write_sessions(base_dir, *first, started("b", at=2000.0), ended("b", 2030.0))
    stage = stage_of(read_run(base_dir))
    assert (stage["status"], stage["seconds"], len(stage["sessions"])) == ("complete", 90.0, 2)
    assert stage["sessions"][0]["message"] == "stopped by a signal"


@pytest.mark.parametrize(
    "fields, status",
    [
        ({}, "running"),
        ({"process": [2**22 + 1, "1"]}, "killed"),
        ({"process": [os.getpid(), "1"]}, "killed"),  # the number belongs to another process now
        ({"host": "elsewhere"}, "killed"),
    ],
)
def test_session_without_an_end_is_running_or_was_killed(base_dir, fields, status):
    write_training(base_dir)
    write_sessions(base_dir, started(at=time.time() - 5, **fields))
    stage = stage_of(read_run(base_dir))
    assert stage["status"] == status and stage["seconds"] >= 0
    if status == "killed":
        assert "killed" in stage["message"]


def test_killed_session_lasted_until_its_last_line(base_dir):
    path = write_training(base_dir)
    os.utime(path, (1500, 1500))
    write_sessions(base_dir, started(at=1000.0, process=[2**22 + 1, "1"]))
    assert stage_of(read_run(base_dir))["seconds"] == 500.0


def test_sessions_of_other_tags_are_not_counted(base_dir):
    write_training(base_dir)
    write_sessions(base_dir, started("a"), ended("a"), started("b", flags={"depth": 9}), ended("b"))
    assert read_run(base_dir)["totals"]["hours"] == pytest.approx(60 / 3600)


def test_cost_is_of_all_gpus_at_the_given_or_the_typical_price():
    hour = {"seconds": 3600.0, "gpus": 8, "gpu": "NVIDIA H100 80GB HBM3"}
    assert total_time([hour], 0.0)["cost"] == pytest.approx(8 * 3.0)
    totals = total_time([hour, hour], 2.5)
    assert (totals["gpu_hours"], totals["cost"]) == (16.0, 40.0)
    assert total_time([hour | {"gpus": 0}], 2.5)["cost"] == 2.5  # without GPUs: the hour of the machine
    assert "cost" not in total_time([hour | {"gpu": ""}], 0.0)


@dataclass(frozen=True)
class Flags:
    depth: int = flag(20, "layers", COUNT)
    compile: bool = flag(True, "compile")
    run: str = flag("", "name")
    plan: bool = flag(False, "plan")


def test_recorded_command_line_has_the_flags_that_differ_from_the_defaults(monkeypatch):
    assert command_line("base_train", Flags()) == "python -m scripts.base_train"
    flags = Flags(depth=4, compile=False, run="it's")
    assert (
        command_line("base_train", flags) == """python -m scripts.base_train --depth 4 --no-compile --run 'it'"'"'s'"""
    )
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert command_line("base_train", Flags()) == "torchrun --nproc_per_node=8 --nnodes=2 -m scripts.base_train"


def test_own_process_is_running():
    assert is_running(started()) and not is_running(started(process=[os.getpid(), "0"]))


def run_stage(base, error=None, flags=None):
    """Runs a stage that logs and then raises `error`; returns the lines of its sessions."""

    @recorded("base_train")
    def main(flags):
        write_training(base)
        if error:
            raise error
        return "result"

    try:
        assert main(flags or Flags(depth=2)) == "result"
    except BaseException as raised:
        if raised is not error:
            raise
    path = base / "report/sessions.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    "error, end, words",
    [
        (None, "complete", ""),
        (UserError("bad  flag"), "failed", "bad flag"),
        (RuntimeError("boom"), "failed", "RuntimeError: boom"),
        (KeyboardInterrupt(), "interrupted", "Ctrl-C"),
        (Stopped("stopped by a signal after step 4"), "stopped", "step 4"),
        (Restart("out of memory: fewer rows", None), "restarted", "fewer rows"),
    ],
)
def test_every_end_of_a_stage_is_recorded_and_reported(base_dir, error, end, words):
    start, last = run_stage(base_dir, error)
    assert start["stage"] == "base_train" and start["environment"]["Python"] and start["flags"]["depth"] == 2
    assert last["end"] == end and words in last["message"]
    html, text = (base_dir / "report/report.html").read_text(), (base_dir / "report/report.md").read_text()
    assert f'"status":"{end}"' in html and f"| Pretraining | {end} |" in text


def test_report_is_written_when_a_stage_starts(base_dir):
    with record.session("base_train", Flags(depth=2)):
        html = (base_dir / "report/report.html").read_text()
    assert '"status":"running"' in html


def test_plan_and_other_ranks_record_nothing(base_dir, monkeypatch):
    assert run_stage(base_dir, flags=Flags(plan=True)) == []
    monkeypatch.setenv("RANK", "1")
    assert run_stage(base_dir) == []


def test_stage_does_not_fail_because_of_its_report(base_dir, monkeypatch, capsys):
    monkeypatch.setattr(record.files, "write_report", lambda base: 1 / 0)
    assert [line.get("end") for line in run_stage(base_dir)] == [None, "complete"]
    assert "the report was not written (ZeroDivisionError" in capsys.readouterr().err


def test_recorded_stage_keeps_its_command_line_and_errors(base_dir, capsys):
    @command
    @recorded("base_train")
    def main(flags: Flags) -> None:
        raise UserError("no data")

    with pytest.raises(SystemExit, match="error: no data"):
        main(["--depth", "3"])
    assert outcome(SystemExit(0)) == ("complete", "")


# ---- report.html, report.md ----


def hostile_run(base):
    config = {"flags": {"run": HOSTILE}, "settings": {HOSTILE: 1}}
    path = write_training(base, config=config)
    samples = {"step": 10, "samples": [{"prompt": HOSTILE, "completion": f"```\n{HOSTILE}"}]}
    path.write_text(path.read_text() + json.dumps(samples) + "\n")
    write_sessions(base, started(command=HOSTILE), ended(end="failed", message=HOSTILE))
    return read_run(base)


def test_hostile_text_stays_data_in_the_page(base_dir):
    text = page(data_of([hostile_run(base_dir)]))
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert "<" not in embedded
    assert json.loads(embedded)["runs"][0]["stages"][0]["message"] == HOSTILE
    assert text.count("<img") == 0 and text.count("</script>") == 2


def test_hostile_text_is_escaped_in_markdown(base_dir):
    lines = markdown([hostile_run(base_dir)]).splitlines()
    outside, fence = [], ""
    for line in lines:
        if fence:
            fence = "" if line == fence else fence
        elif line.startswith("```"):
            fence = line.removesuffix("text")
        else:
            outside.append(line)
    assert not fence and any(HOSTILE in line for line in lines)  # within a block of code it is as it was
    assert not any("<" in line for line in outside)
    rows = [line for line in outside if "onerror" in line]
    cells = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert rows and cells <= {3, 6}  # no cell was split


def test_infinite_numbers_become_null(base_dir):
    write_training(base_dir)
    (base_dir / "report/base_train.json").write_text('{"train/loss": NaN, "x": [Infinity]}')
    embedded = page(data_of([read_run(base_dir)])).partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(embedded, parse_constant=pytest.fail)["runs"][0]["stages"][0]["numbers"]["x"] == [None]


def test_report_of_a_long_run_is_small(base_dir):
    write_training(base_dir, steps=5000)
    write_report(base_dir)
    assert (base_dir / "report/report.html").stat().st_size < 200_000


# ---- the script ----


def refusal(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        report.main(argv)
    assert "\n" not in str(exit_.value)
    return str(exit_.value)


def test_script_refuses_what_it_cannot_report_in_one_line(base_dir, tmp_path, capsys):
    assert "has no runs: train a model first" in refusal([], capsys)
    write_training(base_dir)
    assert "no run with the tag 'd7'" in refusal(["d7"], capsys)
    assert "there is no such base folder" in refusal([str(tmp_path / "nowhere")], capsys)
    assert "has no runs" in refusal([str(tmp_path)], capsys)


def test_script_writes_the_report_and_prints_numbers_and_warnings(base_dir, capsys):
    pytest.importorskip("matplotlib")
    path = write_training(base_dir)
    path.write_text(path.read_text() + "damage\n")
    (base_dir / "report/base_train.json").write_text('{"steps": 10, "val/bpb": 0.51239}')
    report.main([])
    out = capsys.readouterr().out
    assert "warning: report/metrics/base_train-d2.jsonl: 1 damaged line" in out
    assert "val/bpb" in out and "0.5124" in out and "report.html" in out
    text = (base_dir / "report/report.md").read_text()
    assert "| base_train | val/bpb | 0.5124 |" in text and "](report-base_train.png)" in text
    assert (base_dir / "report/report-base_train.png").read_bytes().startswith(b"\x89PNG")


def test_price_is_kept_when_a_stage_rewrites_the_report(base_dir, capsys):
    write_training(base_dir)
    write_sessions(base_dir, started(), ended())
    report.main(["--price", "2.5"])
    run_stage(base_dir)
    assert "at $2.5 per hour (--price)" in (base_dir / "report/report.md").read_text()
    report.main([])
    assert read_run(base_dir)["totals"]["price"] == 2.5
    report.main(["--price", "3"])
    assert read_run(base_dir)["totals"]["price"] == 3.0


@pytest.mark.parametrize("text", ["", "cheap", "nan", "-1", "1e999"])
def test_damaged_price_is_ignored(base_dir, text):
    write_training(base_dir)
    (base_dir / "report/price").write_text(text)
    assert "price" not in read_run(base_dir)["totals"]


def test_report_without_matplotlib_has_no_plots(base_dir, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    write_training(base_dir)
    report.main([])
    assert "pip install 'nanochat[plots]'" in capsys.readouterr().out
    assert "![" not in (base_dir / "report/report.md").read_text()


def test_runs_are_compared_with_a_table_of_what_differs(base_dir, tmp_path, capsys):
    write_training(base_dir, tag="a", config={"flags": {"depth": 2, "seed": 1, "model_tag": "a"}})
    write_training(tmp_path / "other", tag="b", config={"flags": {"depth": 4, "seed": 1, "model_tag": "b"}})
    report.main(["a", str(tmp_path / "other")])
    runs = [read_run(base_dir, "a"), read_run(tmp_path / "other")]
    assert differences(runs) == [{"stage": "base_train", "name": "flags.depth", "values": [2, 4]}]
    assert "| base_train | flags.depth | 2 | 4 |" in (base_dir / "report/report-a-other.md").read_text()
    assert (base_dir / "report/report-a-other.html").exists()


def test_compared_runs_with_equal_tags_are_named_with_their_folders(base_dir, tmp_path, capsys):
    for base in (base_dir, tmp_path / "other"):
        write_training(base)
        (base / "report/base_train.json").write_text('{"steps": 10}')
    report.main([str(base_dir), str(tmp_path / "other")])
    out = capsys.readouterr().out
    assert "base/d2" in out and "other/d2" in out


# ---- the server ----


@pytest.fixture
def server(base_dir):
    with ReportServer(0, lambda: [read_run(base_dir)]) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(url, **headers):
    """(status, text, headers) of a response."""
    try:
        with closing(urllib.request.urlopen(urllib.request.Request(url, headers=headers))) as response:
            return response.status, response.read().decode(), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), error.headers


def test_server_sends_the_page_and_new_data_only(server, base_dir):
    assert server.server_address[0] == "127.0.0.1"
    write_training(base_dir, steps=3)
    assert get(server.url)[1] == page(None)
    status, text, headers = get(f"{server.url}data.json")
    assert status == 200 and json.loads(text)["runs"][0]["stages"][0]["step"] == 3
    assert get(f"{server.url}data.json", **{"If-None-Match": headers["ETag"]})[0] == 304
    write_training(base_dir, steps=4)
    assert get(f"{server.url}data.json", **{"If-None-Match": headers["ETag"]})[0] == 200
    assert get(f"{server.url}other")[0] == 404


def test_server_refuses_other_names_and_reports_a_folder_without_runs(server):
    assert get(server.url, Host="evil.example")[0] == 403
    status, text, _ = get(f"{server.url}data.json")
    assert status == 503 and "has no runs" in text


def test_port_in_use_ends_in_one_line(server, capsys):
    assert "choose another --port" in refusal(["--serve", "--port", str(server.server_address[1])], capsys)
