"""
The page of the web chat in Chromium, with the real server and a tiny model that has memorised a few conversations:
streaming, stopping, editing, several conversations, failures, and that generated text never runs as a script.

    python -m pytest tests/test_page.py
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from factories import save_checkpoint, tiny_gpt, wait_until

from nanochat.conversation import render
from nanochat.tokenizer import Tokenizer

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
expect = sync_api.expect
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed: apt-get install chromium"),
]

ROOT = Path(__file__).resolve().parent.parent
WHO, SUM, CODE, EVIL, LONG = "Who are you?", "What is 12 * 13?", "Show me code.", "Be evil.", "Go on."
RESPONSES = {
    WHO: "I am **nanochat**.",
    SUM: [
        {"type": "python", "text": "12*13"},
        {"type": "python_output", "text": "156"},
        {"type": "text", "text": "12 * 13 = 156."},
    ],
    CODE: "Here:\n\n```python\nprint('<b>hi</b>')\n```\n\n- one\n  - two",
    EVIL: "<img src=x onerror=alert(1)> <script>alert(2)</script> [x](javascript:alert(3)) ![y](http://127.0.0.1:9/y)",
    LONG: "la la\n\n" * 100,  # truncated in training, so that the model never ends it
}
CONTEXT = 4096
STEPS = 120  # enough for a loss below 0.05 nats
TIMEOUT_MS = 30_000  # for a busy machine
# Greedy decoding unless a test changes the settings: a sampled token can differ from the memorised one.
GREEDY = "if (location.protocol === 'http:') localStorage['nanochat.settings'] ??= '{\"temperature\": 0}'"


# ---- model, server, browser ----


def memorise_responses(tokenizer):
    """Trains a tiny model until it generates RESPONSES, also as the second response of a conversation."""
    model = tiny_gpt(initial=True, sequence_len=CONTEXT, n_kv_head=2, n_embd=64)
    turns = {q: [{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in RESPONSES.items()}
    conversations = [*turns.values(), turns[WHO] + turns[SUM], turns[SUM] + turns[WHO], turns[WHO] + turns[LONG]]
    x_BT = torch.zeros(len(conversations), 160, dtype=torch.long)
    y_BT = torch.full_like(x_BT, -1)
    for b, messages in enumerate(conversations):
        ids, mask = render({"messages": messages}, tokenizer, max_tokens=161)
        x_BT[b, : len(ids) - 1] = torch.tensor(ids[:-1])
        y_BT[b, : len(ids) - 1] = torch.where(torch.tensor(mask[1:]) == 1, torch.tensor(ids[1:]), -1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        loss = model(x_BT, y_BT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    return model


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A base folder with the model as the stages sft and mid."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer.load(GOLDEN / "tokenizer")
    model = memorise_responses(tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        for stage in ("sft", "mid"):
            save_checkpoint(model, stage, "memorised", tokenizer=tokenizer)
    return folder


class Server:
    """Runs scripts.chat_web in a process, always at the same URL."""

    def __init__(self, base_folder, *flags):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url, self.flags, self.base_folder = f"http://127.0.0.1:{self.port}/", flags, base_folder

    def start(self):
        """Starts the process and returns at once; wait until it is `ready`."""
        environment = os.environ | {"NANOCHAT_BASE_DIR": str(self.base_folder), "OMP_WAIT_POLICY": "PASSIVE"}
        environment.pop("NANOCHAT_API_KEY", None)
        command = [sys.executable, "-m", "scripts.chat_web", "--device", "cpu", "--no-compile"]
        command += ["--port", str(self.port), *self.flags]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment)
        return self

    def ready(self):
        assert self.process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(self.url + "health") as reply:
                return reply.status == 200
        except urllib.error.URLError:
            return False

    def num_running(self):
        with urllib.request.urlopen(self.url + "stats") as reply:
            return sum(device["running"] for device in json.load(reply)["devices"])

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(base_folder):
    server = Server(base_folder).start()
    wait_until(server.ready, 60)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def strict_server(base_folder, server):
    """A server with two models, an API key, and one request at a time."""
    flags = ["-i", "sft,mid", "--api-key", "secret", "--num-rows", "1", "--queue", "0"]
    strict = Server(base_folder, *flags).start()
    wait_until(strict.ready, 60)
    yield strict
    strict.kill()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
            yield browser


@pytest.fixture
def new_page(browser):
    """Opens pages with separate storages; at the end none may have had an error or opened a dialog."""
    contexts, faults = [], []

    def new_page(url, context=None, **settings):
        if context is None:
            context = browser.new_context(**({"viewport": {"width": 1200, "height": 800}} | settings))
            context.grant_permissions(["clipboard-read", "clipboard-write"])
            context.add_init_script(GREEDY)
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
        page.on("console", lambda line: faults.append(line.text) if "Content Security" in line.text else None)
        page.goto(url)
        return page

    yield new_page
    for context in contexts:
        context.close()
    assert not faults


@pytest.fixture
def page(new_page, server):
    return new_page(server.url)


def ask(page, message, wait=True):
    page.get_by_label("Your message").fill(message)
    page.keyboard.press("Enter")
    if wait:
        expect(page.locator("article").last).not_to_have_class(re.compile("running"), timeout=TIMEOUT_MS)
        expect(page.get_by_label("Send", exact=True)).to_be_visible()


def response(page):
    return page.locator("article.assistant").last


def prose(page):
    return response(page).locator(".prose")


def stored(page):
    """Returns the conversations in the browser's storage, the newest last."""
    values = page.evaluate("Object.entries(localStorage).filter(([k]) => k.includes('conversation')).map(([, v]) => v)")
    return sorted(map(json.loads, values), key=lambda conversation: conversation["updated"])


def titles(page):
    return page.locator("#list a").all_inner_texts()


def stream(*events, status=200, **more):
    """Returns a response for Playwright to send instead of the server, with text that the model does not generate."""
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return {"status": status, "content_type": "text/event-stream", "body": "".join(lines), **more}


DONE = {"done": True, "finish_reason": "stop", "tokens": 2, "prompt_tokens": 5, "dropped": 0}


# ---- messages and responses ----


def test_response_streams_with_tool_call_and_token_count(page):
    expect(page).to_have_title("nanochat")
    ask(page, SUM)
    expect(prose(page)).to_have_text(re.compile(r"12\*13\s*→\s*156\s*12 \* 13 = 156\."))
    expect(response(page).locator(".tool b")).to_have_text("156")
    expect(response(page)).to_contain_text(re.compile(r"\d+ tokens · .*first token \d"))
    expect(page.locator("#status")).to_have_text("nanochat: 12 * 13 = 156.")  # announced once, when it is complete
    expect(page).to_have_title(f"{SUM} – nanochat")
    ask(page, WHO)  # the first response is sent back with its tool call
    expect(prose(page).locator("strong")).to_have_text("nanochat")
    response(page).get_by_label("Copy response").click()
    assert page.evaluate("navigator.clipboard.readText()") == RESPONSES[WHO]


def test_request_contains_conversation_and_settings(page):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0.2")
    page.get_by_label("Top-k").fill("999")
    page.get_by_label("Maximum length").fill("40")
    expect(page.get_by_label("Model")).to_be_hidden()
    page.get_by_role("button", name="Done").click()
    ask(page, SUM)
    page.reload()
    with page.expect_request("**/chat/completions") as sent:
        ask(page, WHO)
    turn = [{"role": "user", "content": SUM}, {"role": "assistant", "content": RESPONSES[SUM]}]
    settings = {"temperature": 0.2, "top_k": 200, "max_tokens": 40}  # 999 is clamped to the limit
    assert sent.value.post_data_json == {"messages": [*turn, {"role": "user", "content": WHO}], **settings}
    ask(page, LONG)
    expect(response(page)).to_contain_text("reached the maximum length")


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_ends_response_and_frees_slot(page, server, how):
    ask(page, "", wait=False)  # an empty message is not sent
    expect(page.locator("article")).to_have_count(0)
    page.evaluate("settings.max_tokens = 4000")
    ask(page, LONG, wait=False)
    expect(prose(page)).to_contain_text("la")
    page.get_by_label("Stop").click() if how == "button" else page.keyboard.press("Escape")
    expect(response(page)).to_contain_text("Stopped.")
    text = prose(page).inner_text()
    page.reload()
    assert prose(page).inner_text() == text and "la" in text
    wait_until(lambda: server.num_running() == 0)  # it must not generate all 4,000 tokens


def test_edit_and_regenerate_replace_later_messages(page):
    ask(page, WHO)
    ask(page, SUM)
    page.locator("article.user").first.hover()
    page.get_by_label("Edit message").first.click()
    field = page.get_by_label("Edited message", exact=True)
    expect(field).to_be_focused()
    field.press("Escape")
    expect(page.locator("article")).to_have_count(4)
    page.get_by_label("Your message").press("ArrowUp")  # edits the last message
    expect(field).to_have_value(SUM)
    field.press("Escape")
    page.get_by_label("Edit message").first.click()
    field.fill(CODE)
    field.press("Enter")
    expect(page.locator("article")).to_have_count(2)
    expect(prose(page).locator("pre")).to_have_text("print('<b>hi</b>')")
    with page.expect_request("**/chat/completions") as sent:
        response(page).get_by_label("Regenerate").click()
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": CODE}]
    expect(prose(page).locator("li li")).to_have_text("two")
    page.route("**/chat/completions", lambda route: route.fulfill(**stream({"error": "out of memory"})))
    response(page).get_by_label("Regenerate").click()
    expect(response(page).locator(".failure")).to_contain_text("out of memory")
    expect(prose(page).locator("li li")).to_have_text("two")  # the previous response is restored


# ---- conversations ----


def test_conversations_can_be_reopened_renamed_and_deleted(page):
    ask(page, WHO)
    page.keyboard.press("Control+Shift+O")
    expect(page.get_by_role("heading", name="What would you like to know?")).to_be_visible()
    ask(page, SUM)
    assert titles(page) == [SUM, WHO]
    page.get_by_role("link", name=WHO).click()
    expect(prose(page)).to_have_text("I am nanochat.")
    page.go_back()
    expect(prose(page)).to_contain_text("156")
    page.reload()
    expect(prose(page)).to_contain_text("156")
    page.get_by_role("link", name=SUM).hover()
    page.get_by_label(f"Rename “{SUM}”").click()
    page.get_by_label("Title").fill("<b>Sums</b>")
    page.keyboard.press("Enter")
    assert titles(page) == ["<b>Sums</b>", WHO]
    page.get_by_role("link", name="<b>Sums</b>").focus()  # focus shows the buttons too
    page.get_by_role("button", name="Delete “<b>Sums</b>”").click()
    page.get_by_role("button", name="Cancel").click()
    assert len(stored(page)) == 2
    page.get_by_role("button", name="Delete “<b>Sums</b>”").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator("article")).to_have_count(0)
    assert titles(page) == [WHO] == [conversation["title"] for conversation in stored(page)]
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Delete all").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator("#list a")).to_have_count(0)
    assert stored(page) == []


def test_response_continues_while_another_conversation_is_shown(page):
    page.evaluate("settings.max_tokens = 1500")
    ask(page, LONG, wait=False)
    expect(prose(page)).to_contain_text("la")
    page.get_by_role("button", name="New conversation").click()
    ask(page, WHO)
    expect(prose(page)).to_have_text("I am nanochat.")
    page.get_by_role("link", name=LONG).click()
    expect(response(page)).to_contain_text(re.compile(r"1,500 tokens · [\d,]+ tokens/s"), timeout=TIMEOUT_MS)


def test_reload_keeps_the_partial_response(page):
    page.evaluate("settings.max_tokens = 4000")
    ask(page, LONG, wait=False)
    expect(prose(page)).to_contain_text("la")
    page.reload()
    expect(prose(page)).to_contain_text("la")
    expect(response(page)).to_contain_text(re.compile("incomplete|before the response was complete"))
    response(page).get_by_role("button", name="Regenerate").click()
    page.get_by_label("Stop").click()


def test_two_tabs_keep_each_others_changes(page, new_page, server):
    ask(page, WHO)
    other = new_page(page.url, page.context)
    expect(prose(other)).to_have_text("I am nanochat.")
    for tab in (page, other):
        tab.evaluate("settings.max_tokens = 1500")
        ask(tab, LONG, wait=False)
        expect(prose(tab)).to_contain_text("la")
    for tab in (page, other):
        expect(response(tab)).to_contain_text("1,500 tokens", timeout=TIMEOUT_MS)
    assert [conversation["messages"][-1]["tokens"] for conversation in stored(page)] == [1500, 1500]
    for tab in (page, other):
        assert sorted(titles(tab)) == [WHO, f"{WHO} (2)"]
    other.get_by_role("link", name=WHO, exact=True).click()
    page.get_by_role("link", name=WHO, exact=True).click()
    ask(other, SUM)
    expect(page.locator("article")).to_have_count(other.locator("article").count())  # it shows the other tab's change


def test_full_or_corrupt_storage_is_reported(page):
    ask(page, WHO)
    page.evaluate("localStorage['nanochat.conversation.x'] = '{\"half'; localStorage['nanochat.settings'] = '[1'")
    page.reload()
    expect(page.locator("#banner")).to_contain_text("A stored conversation could not be read")
    expect(prose(page)).to_have_text("I am nanochat.")
    page.evaluate('localStorage[\'nanochat.settings\'] = \'{"gone": 1, "top_k": "x", "max_tokens": 77}\'')
    page.reload()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Top-k")).to_have_value("50")
    expect(page.get_by_label("Maximum length")).to_have_value("77")
    page.get_by_role("button", name="Done").click()
    page.evaluate("let n = 1e6; while (n > 1) try { localStorage.fill = (localStorage.fill ?? '') + 'x'.repeat(n) }"
                  " catch { n /= 2 }")  # fmt: skip
    ask(page, SUM)
    expect(page.locator("#banner")).to_contain_text("storage for this page is full")
    expect(prose(page)).to_contain_text("156")


# ---- generated text never runs ----


def check_nothing_ran(page, requests):
    assert page.locator(":is(article, #side, #banner, dialog) :is(img, script, iframe, b b, [onerror])").count() == 0
    links = page.locator("article a").evaluate_all("links => links.map(link => [link.protocol, link.rel])")
    assert set(map(tuple, links)) <= {("http:", "noopener noreferrer"), ("https:", "noopener noreferrer")}
    assert all(url.startswith(page.url.split("#")[0]) for url in requests)


def test_generated_html_stays_text(page):
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    ask(page, EVIL)
    image = prose(page).locator("a")  # images are not loaded: the alternative text links to them
    expect(image).to_have_text("y")
    expect(prose(page)).to_have_text(RESPONSES[EVIL].replace("![y](http://127.0.0.1:9/y)", "y"))
    html = "<img src=x onerror=alert(1)><script>alert(1)</script>"
    ask(page, html)
    expect(page.locator("article.user .text").last).to_have_text(html)
    page.get_by_role("button", name="New conversation").click()
    ask(page, html)
    assert titles(page)[0] == html
    check_nothing_ran(page, requests)


def test_html_in_any_server_response_stays_text(page):
    html = "<img src=x onerror=alert(1)>"
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    markdown = f"# {html}\n\n- {html}\n\n> {html}\n\n|{html}|\n|-|\n|{html}|\n\n`{html}`\n\n```{html}\n{html}\n```\n\n"
    markdown += f'[a](  javascript:alert(1)) [b](data:text/html,x) [c](//x) <http://x/" onclick=alert(1)> [{html}]'
    markdown += "(https://x.org/)\n\n![p](javascript:alert(1)) ![q](https://x.org/q.png) [d](java\tscript:x) &lt;"
    parts = [{"token": html, "part": "python"}, {"token": html, "part": "python_output"}, {"token": markdown}]
    page.route("**/chat/completions", lambda route: route.fulfill(**stream(*parts, DONE)))
    ask(page, "parts")
    expect(prose(page)).to_contain_text("&lt;")
    assert prose(page).inner_text().count(html) == 10  # not in the code's language, which is cut at the blank
    expect(response(page).locator(".code > div")).to_have_text("<img")
    check_nothing_ran(page, requests)
    error = {"error": {"message": html, "type": html, "param": None, "code": None}}
    page.unroute("**/chat/completions")
    page.route("**/chat/completions", lambda route: route.fulfill(status=400, json=error))
    ask(page, "refused")
    expect(response(page).locator(".failure span")).to_have_text(html)
    models = {"object": "list", "data": [{"id": html}, {"id": "</option></select>" + html}]}
    page.route("**/v1/models", lambda route: route.fulfill(json=models))
    page.reload()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Model").locator("option").first).to_have_text(html)
    check_nothing_ran(page, requests)


MARKDOWN = {
    "a *b* **c** ***d*** __e__ ~~f~~": "<p>a <em>b</em> <strong>c</strong> <strong><em>d</em></strong> "
    "<strong>e</strong> <del>f</del></p>",
    "2*3*4 snake_case_name 2 * 3 ** 4 \\*x\\*": "<p>2*3*4 snake_case_name 2 * 3 ** 4 *x*</p>",
    "a\nb\n\n\nc": "<p>a<br>b</p><p>c</p>",
    "# A #\n### B\n---": "<h3>A</h3><h5>B</h5><hr>",
    "1. a\n2. b\n   - c\n   - d\n\n   e\n3. f": "<ol><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li><li><p>d</p>"
    "</li></ul><p>e</p></li><li><p>f</p></li></ol>",
    "- a\n  1. b\n* c\n\nd": "<ul><li><p>a</p><ol><li><p>b</p></li></ol></li></ul><ul><li><p>c</p></li></ul><p>d</p>",
    "> a\n> > b\n\nc": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>",
    "7. a": '<ol start="7"><li><p>a</p></li></ol>',
    "`a` ``b ` c`` `d": "<p><code>a</code> <code>b ` c</code> `d</p>",
    "see https://x.org/a_(b). [**c**](mailto:a@x.org)": '<p>see <a href="https://x.org/a_(b" target="_blank" '
    'rel="noopener noreferrer">https://x.org/a_(b</a>). <a href="mailto:a@x.org" target="_blank" '
    'rel="noopener noreferrer"><strong>c</strong></a></p>',
}
NASTY = [
    "text\n**bold** text\n***\na | b\n-|-\n1|2|3\n\n- x\n\n\n  y\n-\n- z\n```js\nlet `a`;\n\n```\n~~~\nopen **and",
    "> ```\n> code\n> ```\n1. one\n\n   ```\n   two\n   ```\n2. three\n\n[a](b [c](https://x.org) `d\n\n\\`e\n# f\n",
    "a\ufffcb **x\ufffc** | y\n-|-\n\ufffc | `\ufffc`\n\n```\n\ufffc\n```\n[\ufffc](https://x.org/)\n\n\ufffc",
]


def test_markdown_renders_to_expected_html(page):
    html = """text => { const prose = new Prose();
        prose.update(flatten([{ type: 'text', text }]), true); return prose.node.innerHTML }"""
    for markdown, expected in MARKDOWN.items():
        assert page.evaluate(html, markdown) == expected


def test_markdown_streamed_equals_markdown_at_once(page):
    grown = """text => { const calls = [...'123456789'].map(n => ({ expression: n, result: n + '!' }));
        const whole = new Prose(), grown = new Prose();
        whole.update({ text, calls }, true);
        for (let end = 0; end <= text.length; end++) grown.update({ text: text.slice(0, end), calls }, false);
        grown.update({ text, calls }, true);
        return [grown.node.innerHTML, whole.node.innerHTML] }"""
    for markdown in [*MARKDOWN, *NASTY]:
        one, other = page.evaluate(grown, markdown)
        assert one == other, markdown
    html = page.evaluate(grown, NASTY[2])[1]
    assert re.findall(r"\d(?=!)", html) == list("123456789")[: NASTY[2].count("\ufffc")]  # each call at its position


def test_markdown_parses_in_linear_time(page):
    pieces = ["*a ", "**a", "[", "[a](", "`", "``a`", "> ", "- ", "# ", "|", "|-", "\\", "<", "_a", " ", "http://x."]
    pieces += ["\n", '![a](b "', "1. ", "```a", "~"]
    slowest = page.evaluate(
        """pieces => Math.max(...pieces.flatMap(a => pieces.map(b => {
            const text = (a + b).repeat(2e4 / (a + b).length), start = performance.now();
            new Prose().update(flatten([{ type: 'text', text }]), false);
            return performance.now() - start })))""",
        pieces,
    )
    assert slowest < 5000  # ms, for 441 texts of 20,000 characters; quadratic parsing took minutes


# ---- failures ----


def test_page_recovers_when_server_restarts(page, server):
    page.evaluate("settings.max_tokens = 4000")
    ask(page, LONG, wait=False)
    expect(prose(page)).to_contain_text("la")
    server.kill()
    expect(response(page).locator(".failure")).to_contain_text("was lost before the response was complete. The partial")
    expect(page.locator("#banner")).to_contain_text("cannot be reached")
    ask(page, WHO)
    expect(response(page).locator(".failure")).to_contain_text("cannot be reached")
    texts = page.locator("article").all_inner_texts()
    assert "la" in texts[1]
    server.start()
    wait_until(server.ready, 60)
    expect(page.locator("#banner")).to_be_hidden(timeout=TIMEOUT_MS)
    page.reload()
    assert page.locator("article").all_inner_texts()[0] == texts[0]
    assert "la" in page.locator("article").all_inner_texts()[1]
    page.get_by_role("button", name="Try again").click()
    expect(response(page).locator(".failure")).to_have_count(0)
    expect(response(page)).to_contain_text("tokens/s")


def test_api_key_model_choice_and_full_queue(new_page, strict_server):
    page = new_page(strict_server.url)
    expect(page.locator("#banner")).to_contain_text("requires an API key")
    ask(page, WHO)
    expect(response(page).locator(".failure")).to_contain_text("requires an API key")
    page.locator("#banner").get_by_role("button", name="Enter the API key").click()
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").press("Tab")
    expect(page.locator("#banner")).to_be_hidden()
    page.get_by_label("Model").select_option("mid")
    page.get_by_role("button", name="Done").click()
    with page.expect_request("**/chat/completions") as sent:
        page.get_by_role("button", name="Try again").click()
    assert sent.value.post_data_json["model"] == "mid"
    expect(prose(page)).to_have_text("I am nanochat.")
    other = new_page(strict_server.url, page.context)
    other.evaluate("settings.max_tokens = 4096")
    ask(other, LONG, wait=False)
    expect(prose(other)).to_contain_text("la")
    ask(page, SUM)
    retry = response(page).get_by_role("button", name="Try again")
    expect(retry).to_be_disabled()
    expect(retry).to_have_text(re.compile(r"Try again in \d s"))
    other.keyboard.press("Escape")
    retry.click()  # Playwright waits until it is enabled
    expect(prose(page)).to_contain_text("156")


def test_long_conversation_omits_its_oldest_messages(page):
    turn = ("[{ role: 'user', content: 'x'.repeat(8000) }, { role: 'assistant', finish: 'stop', "
            "content: [{ type: 'text', text: 'y'.repeat(9000) }] }]")  # fmt: skip
    page.evaluate(f"localStorage['nanochat.conversation.c'] = JSON.stringify("
                  f"{{ title: 'Long', id: 'c', updated: 1, messages: Array(5).fill({turn}).flat() }})")  # fmt: skip
    page.reload()
    page.get_by_role("link", name="Long").click()
    with page.expect_request("**/chat/completions") as sent:
        ask(page, WHO)
    assert [len(m["content"]) for m in sent.value.post_data_json["messages"][::2]] == [8000, len(WHO)]
    assert len(sent.value.post_data_json["messages"][1]["content"][0]["text"]) == 8000  # the server's limit
    expect(response(page)).to_contain_text("messages were left out")
    page.get_by_label("Your message").fill("x" * 8001)
    expect(page.get_by_role("alert")).to_contain_text("1 characters too long")
    expect(page.get_by_label("Send", exact=True)).to_be_disabled()


# ---- screen sizes, keyboard, themes ----


@pytest.mark.parametrize("width", [360, 430])
def test_phone_layout_fits_the_screen(new_page, server, width):
    page = new_page(server.url, viewport={"width": width, "height": 740}, has_touch=True, is_mobile=True)
    fits = "document.documentElement.scrollWidth <= innerWidth && $('log').scrollWidth <= $('log').clientWidth"
    assert page.evaluate(fits)
    wide = f"{'w' * 300}\n\n| {'a | ' * 30}\n|{'-|' * 31}\n\n```\n{'code ' * 60}\n```\n\n`{'c' * 300}` {'- ' * 3}"
    page.route("**/chat/completions", lambda route: route.fulfill(**stream(
        {"token": "1+" * 99, "part": "python"}, {"token": wide}, DONE)))  # fmt: skip
    ask(page, "w" * 400)
    assert page.evaluate(fits)
    link = page.get_by_role("link", name="www")
    expect(link).to_be_hidden()
    page.get_by_role("button", name="Conversations").click()
    expect(link).to_be_visible()
    page.keyboard.press("Escape")
    expect(link).to_be_hidden()
    page.get_by_role("button", name="Conversations").click()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert page.evaluate(fits)


def test_page_works_with_keyboard_only(page):
    page.get_by_role("link", name="Skip to the message field").focus()
    page.keyboard.press("Enter")
    question = page.get_by_label("Your message")
    expect(question).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(question).to_have_value("one\ntwo")
    composing = "new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true, cancelable: true })"
    page.evaluate(f"$('message').dispatchEvent({composing})")  # Enter in an input method picks a character
    expect(page.locator("article")).to_have_count(0)
    page.keyboard.press("Enter")
    expect(page.locator("article.user .text")).to_have_text("one\ntwo")
    page.get_by_role("link", name="Skip to the message field").focus()
    for _ in range(4):
        page.keyboard.press("Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_autoscroll_stops_when_reader_scrolls_up(page):
    at_end = "$('log').scrollHeight - $('log').scrollTop - $('log').clientHeight < 24"
    page.evaluate("settings.max_tokens = 4000")
    ask(page, LONG, wait=False)
    page.wait_for_function("() => document.querySelector('#log').scrollTop > 300")
    page.locator("#log").hover()
    page.mouse.wheel(0, -200)
    jump = page.get_by_label("Scroll to the end")
    expect(jump).to_be_visible()
    top = page.evaluate("$('log').scrollTop")
    height = page.evaluate("$('log').scrollHeight")
    page.wait_for_function(f"() => document.querySelector('#log').scrollHeight > {height} + 100")
    assert abs(page.evaluate("$('log').scrollTop") - top) < 250  # px: the wheel may still have been scrolling
    assert not page.evaluate(at_end)
    jump.click()
    expect(jump).to_be_hidden()
    page.keyboard.press("Escape")
    expect(response(page)).to_contain_text("Stopped.")
    assert page.evaluate(at_end)


# WCAG 2 contrast of every text on the screen with the nearest opaque background.
CONTRASTS = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
    const rgba = colour => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return canvas.getImageData(0, 0, 1, 1).data };
    const luminance = colour => [...rgba(colour)].slice(0, 3).map(c => c / 255)
        .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = node => rgba(getComputedStyle(node).backgroundColor)[3] === 255 || !node.parentElement
        ? getComputedStyle(node).backgroundColor : ground(node.parentElement);
    return [...document.querySelectorAll('body *')]
        .filter(node => node.checkVisibility() && [...node.childNodes].some(c => c.nodeType === 3 && c.data.trim()))
        .filter(node => !node.disabled)
        .map(node => {
            const [a, b] = [getComputedStyle(node).color, ground(node)].map(luminance);
            return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.outerHTML.slice(0, 80)] }) }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_have_enough_contrast(new_page, server, scheme):
    page = new_page(server.url, color_scheme=scheme)
    is_dark = "Math.max(...getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3)) < 64"
    assert page.evaluate(is_dark) == (scheme == "dark")
    contrasts = page.evaluate(CONTRASTS)
    markdown = "# A\n\n[b](https://x.org) `c`\n\n> d\n\n|e|\n|-|\n|f|\n\n```\ng\n```\n"
    page.route("**/chat/completions", lambda route: route.fulfill(**stream(
        {"token": "1", "part": "python"}, {"token": "1", "part": "python_output"}, {"token": markdown}, DONE
    )))  # fmt: skip
    ask(page, "everything")
    contrasts += page.evaluate(CONTRASTS)
    page.unroute("**/chat/completions")
    page.route("**/chat/completions", lambda route: route.abort())
    ask(page, "away")
    page.get_by_role("button", name="Settings").click()
    contrasts += page.evaluate(CONTRASTS)
    assert len(contrasts) > 50
    assert not [(round(ratio, 2), html) for ratio, html in contrasts if ratio < 4.5]  # AA
    page.get_by_text("Light" if scheme == "dark" else "Dark", exact=True).click()
    assert page.evaluate(is_dark) == (scheme == "light")
    page.reload()
    assert page.evaluate(is_dark) == (scheme == "light")
