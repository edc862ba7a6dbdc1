"""
The page of the report in Chromium: values under the pointer and the arrow keys, the horizontal axis, several runs, a
run that is followed while it trains, hostile text, a phone.

    python -m pytest tests/test_report_page.py
"""

import json
import shutil
import threading

import pytest
from test_report import HOSTILE, ended, started, write_core, write_sessions, write_training

from nanochat.report.files import data_of, page
from nanochat.report.reader import read_run
from nanochat.report.server import ReportServer

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
expect = sync_api.expect
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed: apt-get install chromium"),
]
TIMEOUT_MS = 30_000  # for a busy machine


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
            yield browser


@pytest.fixture
def open_page(browser):
    """Opens an address in a new page; at the end no page may have had an error or asked for another address."""
    problems, contexts = [], []

    def open_(url, **settings):
        contexts.append(browser.new_context(**settings))
        new = contexts[-1].new_page()
        new.set_default_timeout(TIMEOUT_MS)
        new.on("pageerror", lambda error: problems.append(str(error)))
        new.on("dialog", lambda dialog: problems.append(dialog.message))
        allowed = (url, "data:", f"{url}data.json")
        new.on("request", lambda request: request.url.startswith(allowed) or problems.append(request.url))
        new.goto(url)
        return new

    yield open_
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture
def show(open_page, base_dir, tmp_path):
    """Opens the report of runs: by default the newest one of the base folder."""

    def show(*runs, **settings):
        file = tmp_path / "report.html"
        file.write_text(page(data_of(runs or [read_run(base_dir)])), encoding="utf-8")
        return open_page(file.as_uri(), **settings)

    return show


def chart(page, title):
    return page.locator("figure", has=page.get_by_text(title, exact=True))


def test_values_are_read_with_pointer_and_arrow_keys(show, base_dir):
    write_training(base_dir)
    loss = chart(show(), "Loss")
    svg = loss.locator("svg.chart")
    svg.hover(position={"x": 50, "y": 60})  # the left end of the axis: step 0, next to step 1
    expect(loss.locator(".tip")).to_contain_text("1 steps")
    expect(loss.locator(".tip")).to_contain_text("5")
    frame, tip = svg.bounding_box(), loss.locator(".tip").bounding_box()
    assert frame["x"] < tip["x"] < frame["x"] + frame["width"] / 2 and frame["y"] < tip["y"] < frame["y"] + 20
    svg.focus()
    svg.press("End")
    expect(loss.locator(".tip")).to_contain_text("10 steps")
    expect(loss.locator("[aria-live]")).to_contain_text("0.5")  # read to users of a screen reader
    svg.press("Escape")
    expect(loss.locator(".tip")).to_be_hidden()
    assert "from 5 to 0.5 at 10 steps" in svg.get_attribute("aria-label")


def test_axis_can_be_tokens_or_hours(show, base_dir):
    write_training(base_dir)
    page = show()
    page.get_by_role("radio", name="tokens").check(force=True)
    svg = chart(page, "Loss").locator("svg.chart")
    assert "at 1,000 tokens" in svg.get_attribute("aria-label")
    page.get_by_role("radio", name="hours").check(force=True)
    assert "hours" in svg.get_attribute("aria-label")


def test_evaluations_and_stages_are_shown(show, base_dir):
    write_training(base_dir)
    write_core(base_dir)
    write_sessions(base_dir, started(), ended(end="failed", message="no space left"))
    page = show()
    expect(page.locator("#stages")).to_contain_text("failed")
    expect(page.locator("#stages")).to_contain_text("no space left")
    core = chart(page, "CORE by task")
    core.locator("summary").focus()
    core.locator("summary").press("Enter")
    expect(core.locator("tr", has_text="hellaswag")).to_contain_text("0.200 (0.067 to 0.333)")
    expect(core.locator("tr", has_text="hellaswag")).to_contain_text("0.349")


def test_several_runs_are_overlaid_with_their_differences(show, base_dir):
    write_training(base_dir, tag="a", config={"flags": {"depth": 2}})
    write_training(base_dir, tag="b", config={"flags": {"depth": 4}}, steps=7)
    page = show(read_run(base_dir, "a"), read_run(base_dir, "b"))
    expect(page.locator("#comparison tr", has_text="flags.depth")).to_contain_text("4")
    loss = chart(page, "Loss")
    assert loss.locator(".legend li").all_inner_texts() == ["a", "b"]
    dashes = loss.locator("path.curve").evaluate_all(
        "paths => paths.map(path => path.getAttribute('stroke-dasharray'))"
    )
    assert len(set(dashes)) == 2  # told apart without colour


def test_hostile_text_is_text(show, base_dir):
    path = write_training(base_dir, config={"flags": {"run": HOSTILE}, "settings": {HOSTILE: HOSTILE}})
    samples = {"step": 10, "samples": [{"prompt": HOSTILE, "completion": HOSTILE}]}
    path.write_text(path.read_text() + json.dumps(samples | {HOSTILE: 1.0}) + "\n")
    write_sessions(base_dir, started(command=HOSTILE), ended(end="failed", message=HOSTILE))
    page = show()
    expect(page.locator("#stages .why")).to_have_text(HOSTILE)
    expect(page.locator("#samples")).to_contain_text(HOSTILE)
    assert page.locator("img, b b").count() == 0


def test_phone_has_no_horizontal_scrolling(show, base_dir):
    write_training(base_dir, config={"flags": {"name": "x" * 300}})
    write_core(base_dir)
    page = show(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page.locator("details.fold").evaluate_all("folds => folds.forEach(fold => fold.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_page_follows_a_run_and_reports_a_lost_server(open_page, base_dir):
    with ReportServer(0, lambda: [read_run(base_dir)]) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        page = open_page(server.url)
        expect(page.locator("main")).to_contain_text("has no runs: train a model first", timeout=TIMEOUT_MS)
        write_sessions(base_dir, started())
        write_training(base_dir, steps=3)
        svg = chart(page, "Loss").locator("svg.chart")
        expect(page.locator("#state")).to_have_text("live", timeout=TIMEOUT_MS)
        assert "at 3 steps" in svg.get_attribute("aria-label")
        page.locator("#settings summary").first.click()
        write_training(base_dir, steps=8)
        expect(page.locator("#stages")).to_contain_text("step 8 of 10", timeout=TIMEOUT_MS)
        assert "at 8 steps" in svg.get_attribute("aria-label")
        assert page.locator("#settings details").first.get_attribute("open") == ""  # what was opened stays open
        (base_dir / "report").rename(base_dir / "gone")
        expect(page.locator("main")).to_contain_text("has no runs", timeout=TIMEOUT_MS)
        (base_dir / "gone").rename(base_dir / "report")
        expect(svg).to_be_visible(timeout=TIMEOUT_MS)
        server.shutdown()
        thread.join()
    expect(page.locator("#state")).to_have_text("the server does not answer", timeout=TIMEOUT_MS)
