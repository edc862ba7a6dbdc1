"""
Identity conversations: from facts and wordings, from another model behind an endpoint, and the errors of both.

    python -m pytest tests/test_make_identity.py
"""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nanochat.conversation import validate
from nanochat.primer import contains_phrase
from nanochat.primer.data import load_wordings, read_sections
from nanochat.primer.identity import MAX_CONVERSATIONS, WORDINGS, Identity, generate_identity, read_identity
from scripts import chat_sft, make_identity
from tasks.customjson import CustomJSON

SAMPLE = Path(make_identity.__file__).parent / "samples/identity.yaml"
NAME_ONLY = Identity(name="Pim")


def facts_file(tmp_path, text):
    path = tmp_path / "facts.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def written(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- facts and wordings ----


def test_sample_gives_several_hundred_different_conversations(tmp_path, capsys):
    out = tmp_path / "identity.jsonl"
    make_identity.main([str(SAMPLE), "--out", str(out)])
    conversations = written(out)
    assert len(conversations) == 600 == len({json.dumps(messages) for messages in conversations})
    for messages in conversations:
        validate({"messages": messages})
    texts = [part for messages in conversations for part in json.dumps(messages).split('"content": ')]
    assert not [text for text in texts if "{" in text.rstrip(', {}]"') and "role" not in text]  # unfilled fields
    whole = out.read_text(encoding="utf-8")
    for fact in ("Kari", "a small robot owl", "the pupils of Berg School", "3 May 2026", "riddles and old maps"):
        assert whole.count(fact) >= 10
    assert "but only in my dreams" in whole and "Hoo-hoo!" in whole and "I am nanochat" not in whole
    assert len(CustomJSON(out)) == 600 and "--identity-file" in capsys.readouterr().out


def test_result_depends_on_the_seed_only():
    first, same, other = (generate_identity(NAME_ONLY, 50, seed) for seed in (0, 0, 1))
    assert first == same != other


def test_every_question_for_the_name_gets_the_name():
    exchanges = [exchange for talk in generate_identity(read_identity(SAMPLE), 300) for exchange in talk]
    required = [exchange for exchange in exchanges if exchange.required]
    assert len(required) > 200
    assert all(contains_phrase(exchange.reply, exchange.required) for exchange in required)


@pytest.mark.slow
def test_name_alone_gives_the_largest_number_of_different_conversations():
    assert len({repr(talk) for talk in generate_identity(NAME_ONLY, MAX_CONVERSATIONS)}) == MAX_CONVERSATIONS


def test_topics_without_a_fact_are_left_out():
    text = repr(generate_identity(NAME_ONLY, 300))
    makers = load_wordings("maker", WORDINGS)["question"]
    assert not any(question in text for question in makers) and "Who are you?" in text
    assert "I am Pim, a small language model." in text


def test_own_name_is_not_denied():
    text = repr(generate_identity(Identity(name="Anna"), 300))
    assert "not Anna" not in text and "Is your name Anna?" in text  # Anna is one of the wrong names for others


def test_every_topic_has_questions_and_replies():
    for section in read_sections(WORDINGS):
        if section != "other assistants":
            wordings = load_wordings(section, WORDINGS)
            assert len(wordings["question"]) >= 5 and len(wordings["reply"]) >= 3, section


def test_facts_need_no_quotation_marks_and_keep_their_spelling(tmp_path):
    path = facts_file(
        tmp_path, "name: No\nbirthday: 2026-05-03\nmaker: ACME Inc.\nlikes: tea\ncatchphrases: [Well…, Ha ha.]\n"
    )
    identity = read_identity(path)
    assert (identity.name, identity.birthday, identity.maker) == ("No", "2026-05-03", "ACME Inc")
    assert identity.likes == ("tea",) and identity.catchphrases == ("Well…", "Ha ha.")


MISTAKES = {
    "name: Kari\nnmae: x": "line 2: unknown fact 'nmae': did you mean name?",
    "name: Kari\ncolour: x": "line 2: unknown fact 'colour': use one of name, what, maker",
    "name: Kari\nmaker: [a, b]": "line 2: maker: expected one text",
    "name: Kari\nlikes:\n  - tea\n  - {a: b}": "line 4: likes: expected a list",
    "name: Kari\nmaker:\nhome: x": "line 2: maker is empty: write a text after the colon, or remove the line",
    "name: ''": "line 1: name is empty",
    "name: Kari\n\nname: Pim": "line 3: 'name' was given in line 1 already: remove one of them",
    "maker: me": 'the name is missing: add a line such as "name: Kari"',
    "name: Kari\nmaker: me: and you": "line 2: not valid YAML.*quotation marks",
    "name: Kari\nlikes: [a, b": r'line \d: not valid YAML.*"\[a, b\]"',
    "name: Kari\nhome: %x": "line 2: not valid YAML",
    "name: Kari\nanswers: blue": 'line 2: answers: expected indented lines of the form "question',
    "name: Kari\nanswers:\n  Why?:": "line 3: the answer is empty",
    "name: Kari\n[a]: b": "line 2: the text before the colon is a list",
    "name: Kari\nwhat: " + 400 * "x": "line 2: what has 400 characters: shorten it to at most 300",
    "just a text": 'line 1: expected facts, one per line, such as "name: Kari"',
    "": 'line 1: expected facts, one per line, such as "name: Kari"',
    "name: a\0b": "not valid YAML",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistake_in_the_facts_is_one_line_with_the_line_number(tmp_path, text):
    path = facts_file(tmp_path, text)
    with pytest.raises(SystemExit) as exit:
        make_identity.main([str(path), "--out", str(tmp_path / "out.jsonl")])
    message = str(exit.value)
    assert re.search(MISTAKES[text], message) and str(path) in message and "\n" not in message
    assert not (tmp_path / "out.jsonl").exists()


def test_unreadable_facts_are_one_line(tmp_path):
    with pytest.raises(SystemExit, match="nowhere.yaml cannot be read"):
        make_identity.main(["nowhere.yaml"])
    (tmp_path / "latin.yaml").write_bytes("name: Zoë".encode("latin-1"))
    with pytest.raises(SystemExit, match="cannot be read as UTF-8"):
        make_identity.main([str(tmp_path / "latin.yaml")])


@pytest.mark.slow
def test_primer_leaves_its_own_identity_out_beside_an_identity_file(tmp_path, golden_tokenizer):
    out = tmp_path / "identity.jsonl"
    make_identity.main([str(SAMPLE), "--out", str(out), "--num", "20"])
    off = {f"{name}_epochs": 0 for name in ("smoltalk", "mmlu", "gsm8k", "simplespelling", "spellingbee")}
    flags = chat_sft.Flags(**off, primer_epochs=1, identity_file=str(out), identity_epochs=1)
    train_data, _ = chat_sft.mixture(flags, golden_tokenizer)
    text = "".join(json.dumps(train_data[i]) for i in range(len(train_data)))
    assert "Kari" in text and "capital" in text and "nanochat" not in text.replace("nanochat, is that you", "")


# ---- another model behind an endpoint ----


class Endpoint(ThreadingHTTPServer):
    """An OpenAI-compatible server. `failures` are given, in order, instead of responses."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.models = ["owl"]
        self.reply = "I am Kari, and I was asked something."
        self.failures = []  # HTTP status | "hang" | "text" | "close"
        self.bodies = []
        self.keys = set()
        self.release = threading.Event()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.bodies.append(body)
        server.keys.add(self.headers.get("Authorization"))
        failure = server.failures.pop(0) if server.failures else None
        if isinstance(failure, int):
            self.send(failure, {"error": {"message": "an explanation"}})
        elif failure == "hang":
            server.release.wait(30)
        elif failure == "text":
            self.send(200, "<html>")
        elif failure == "empty":
            self.send(200, {"choices": []})
        elif failure != "close":
            self.send(200, {"choices": [{"message": {"role": "assistant", "content": server.reply}}]})

    def send(self, status, value):
        content = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setattr(make_identity, "RETRY_SECONDS", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Endpoint() as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.release.set()
        server.shutdown()


def make(endpoint, tmp_path, *argv):
    out = tmp_path / "out.jsonl"
    make_identity.main([str(SAMPLE), "--out", str(out), "--num", "10", "--endpoint", endpoint.url, *argv])
    return written(out)


def test_endpoint_writes_the_replies_from_the_facts(endpoint, tmp_path, capsys):
    conversations = make(endpoint, tmp_path)
    replies = [message["content"] for messages in conversations for message in messages if message["role"] != "user"]
    assert (
        0 < replies.count(endpoint.reply) <= len(endpoint.bodies) < len(replies)
    )  # thanks and facts are not asked for
    assert "the others lacked the fact" in capsys.readouterr().out
    system = endpoint.bodies[0]["messages"][0]
    assert system["role"] == "system" and "maker: the pupils of Berg School" in system["content"]
    assert {body["model"] for body in endpoint.bodies} == {"owl"} and endpoint.keys == {"Bearer secret"}
    assert any(len(body["messages"]) > 2 for body in endpoint.bodies)  # earlier exchanges are sent along


def test_reply_without_the_required_fact_is_replaced_by_a_wording(endpoint, tmp_path, capsys):
    endpoint.reply = "I am ChatGPT."
    conversations = make(endpoint, tmp_path)
    plain = [make_identity.messages(exchanges) for exchanges in generate_identity(read_identity(SAMPLE), 10)]
    asked_for_name = [i for i, messages in enumerate(plain) if "name" in messages[0]["content"]]
    assert asked_for_name and all(conversations[i][1] == plain[i][1] for i in asked_for_name)


@pytest.mark.parametrize("failures", [[503, 429], ["close", 500], ["hang", 502]])
def test_request_is_repeated_after_a_failure_that_may_pass(endpoint, tmp_path, failures):
    endpoint.failures = list(failures)
    expected = make(endpoint, tmp_path, "--timeout", "1")
    endpoint.failures = []
    assert make(endpoint, tmp_path) == expected


ENDPOINT_ERRORS = [
    ([401], [], r"refused the request \(HTTP status 401: .*an explanation.*OPENAI_API_KEY"),
    ([503] * 99, [], r"did not answer 3 times \(HTTP status 503"),
    (["close"] * 99, [], "did not answer 3 times"),
    (["text"], [], "sent no JSON: is it an OpenAI-compatible API"),
    (["empty"], [], "sent no chat completion"),
    (["hang"] * 99, ["--timeout", "0.05"], r"did not answer 3 times \(timed out\): .*--timeout"),
]


@pytest.mark.parametrize("failures, argv, message", ENDPOINT_ERRORS)
def test_endpoint_that_does_not_work_is_one_line(endpoint, tmp_path, failures, argv, message):
    endpoint.failures = list(failures)
    with pytest.raises(SystemExit) as exit:
        make(endpoint, tmp_path, *argv)
    assert re.search(message, str(exit.value)) and "\n" not in str(exit.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_endpoint_that_is_not_there_or_has_several_models_is_one_line(endpoint, tmp_path):
    endpoint.models = ["owl", "hawk"]
    with pytest.raises(SystemExit, match="has 2 models: add --model with one of owl, hawk"):
        make(endpoint, tmp_path)
    make(endpoint, tmp_path, "--model", "hawk")
    assert endpoint.bodies[-1]["model"] == "hawk"
    with pytest.raises(SystemExit, match="did not answer 3 times .*start the server"):
        make_identity.main([str(SAMPLE), "--endpoint", "http://127.0.0.1:9/v1"])
    with pytest.raises(SystemExit, match="write a URL such as"):
        make_identity.main([str(SAMPLE), "--endpoint", "127.0.0.1:8000"])


def test_failing_endpoint_does_not_delay_by_the_requests_that_were_not_sent(endpoint, tmp_path):
    endpoint.failures = [401] * 1000
    start = time.monotonic()
    with pytest.raises(SystemExit):
        make(endpoint, tmp_path, "--num", "600")
    assert len(endpoint.bodies) < 50 and time.monotonic() - start < 60
