"""
Export to a single HTML file, opened from disk in Chromium: tokenizer, calculator and both back ends compute what
nanochat does, and the page is the web chat without a server.

    python -m pytest tests/test_export_html.py
"""

import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from factories import FAMILY, NEEDS_NUMBERS, conversation, save_checkpoint, tiny_gpt

from nanochat.checkpoint_manager import Checkpoint
from nanochat.conversation import render_to_fit
from nanochat.engine import Engine
from nanochat.export import html
from nanochat.export.common import Source, fold_gains
from nanochat.request import Request
from nanochat.tokenizer import PORTABLE_SPLIT_PATTERN, SPLIT_PATTERN, Tokenizer
from nanochat.tools import calculate
from scripts import export

CHROMIUM = shutil.which("chromium")
TIMEOUT_MS = 60_000  # for a busy machine
BACKENDS = ["javascript", "webgpu"]
QUESTION = "How much?"

pytestmark = NEEDS_NUMBERS


# ---- without a browser ----


def source(model, tokenizer, tag="tiny", step=1):
    """The model as the exporter gets it, without files."""
    meta = {"model_config": vars(model.config)}
    checkpoint = Checkpoint(Path("base") / tag / f"step_{step:06d}", step, meta)
    result = Source(checkpoint, tokenizer, "sft", "int8")
    result.__dict__["weights"] = fold_gains({name: weight.detach() for name, weight in model.named_parameters()})
    return result


def test_quantize_rounds_to_half_a_step_and_keeps_rows_of_zeros():
    weight = torch.randn(5, 16) * torch.tensor([1e-3, 1, 100, 0, 1])[:, None]
    values, scales = html.quantize(weight)
    error = (values * scales[:, None] - weight).abs()
    assert (error <= scales[:, None] * 0.5001).all()
    assert values.abs().amax(dim=1).tolist() == [127, 127, 127, 0, 127]


def test_size_estimate_is_an_upper_bound(golden_tokenizer, tmp_path):
    model = source(tiny_gpt(), golden_tokenizer)
    html.write(model, tmp_path / "chat.html")
    assert (tmp_path / "chat.html").stat().st_size < html.num_bytes(model)


def test_chunks_are_of_equal_size_and_lose_nothing():
    pieces = [b"abc", b"", b"defgh", b"i"]
    assert list(html.in_chunks(pieces, 4)) == [b"abcd", b"efgh", b"i"]


def test_unknown_split_pattern_is_refused(golden_tokenizer):
    tokenizer = Tokenizer(r"\w+|\W+", {token: i for i, token in enumerate(golden_tokenizer.tokens)})
    with pytest.raises(ValueError, match="has another: use --to hf"):
        html.check(source(tiny_gpt(), tokenizer))


def test_sizes_that_are_no_multiple_of_4_are_refused(golden_tokenizer):
    model = tiny_gpt(n_embd=36, n_head=6, n_kv_head=1)
    with pytest.raises(ValueError, match="multiples of 4, n_kv_head"):
        html.check(source(model, golden_tokenizer))


def test_export_writes_one_file_and_refuses_to_replace_it(base_dir, golden_tokenizer, tmp_path):
    save_checkpoint(tiny_gpt(), "sft", tokenizer=golden_tokenizer)
    target = tmp_path / "site/chat.html"
    command = ["-i", "sft", "--to", "html", "--out", str(target)]
    export.main(command)
    text = target.read_text(encoding="utf-8")
    assert [path.name for path in target.parent.iterdir()] == ["chat.html"]
    assert not re.search(r"""(src|href)=["']?https?:""", text)  # nothing is loaded from elsewhere
    with pytest.raises(SystemExit, match="exists and is not an empty folder"):
        export.main(command)
    assert target.read_text(encoding="utf-8") == text


# ---- in Chromium ----


def browser_tests(function):
    """Marks a test that drives Chromium."""
    missing = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed: apt-get install chromium")
    return pytest.mark.browser(pytest.mark.slow(missing(function)))


@pytest.fixture(scope="module")
def browser():
    """Chromium with a GPU in software, which pages use only if their address asks for it."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install -e '.[dev]'")
    flags = ["--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"]
    with sync_api.sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=CHROMIUM, args=flags) as browser:
            yield browser


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens exported models in one browser context without a network; at the end no page may have had an error."""
    context = browser.new_context(offline=True)
    context.add_init_script("localStorage['nanochat.settings'] ??= '{\"temperature\": 0, \"max_tokens\": 100000}'")
    faults, urls = [], []

    def open_page(exported, backend="javascript"):
        path = exported
        if isinstance(exported, Source):
            path = tmp_path / f"{exported.checkpoint.tag}.html"
            html.write(exported, path)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("requestfinished", lambda request: urls.append(request.url))
        page.goto(f"{path.as_uri()}?backend={backend}")
        page.evaluate("localModel.loaded.then(() => null)")
        return page

    yield open_page
    context.close()
    assert not faults
    assert all(url.startswith("file:") for url in urls)


def dequantized(model):
    """The same model with the weights that the page computes with."""
    with torch.no_grad():
        if model.config.norm_gains:  # the export multiplies them into the matrices before it rounds these
            for gain_C, block in zip(model.mlp_gains, model.transformer.h, strict=True):
                block.mlp.c_fc.weight.mul_(gain_C)
            model.lm_head.weight.mul_(model.final_gain)
            model.mlp_gains.fill_(1)
            model.final_gain.fill_(1)
        for name, weight in model.named_parameters():
            if html.is_matrix(name, weight):
                values, scales = html.quantize(weight)
                weight.copy_(values * scales[:, None])
    return model


def generate(page, prompt, num_tokens):
    """Greedy tokens of the page's generator, which never stop early."""
    return page.evaluate(
        """async ([prompt, maxTokens]) => {
          const tokens = [];
          localModel.generator.stopTokens = [];
          const options = { temperature: 0, topK: 0, maxTokens };
          for await (const token of localModel.generator.generate(prompt, options)) tokens.push(token);
          return tokens;
        }""",
        [prompt, num_tokens],
    )


def reference(model, tokenizer, prompt, num_tokens):
    """Greedy tokens of the engine, which never stop early."""
    engine = Engine(model, tokenizer, max_slots=1)
    engine.stop_tokens = set()
    return engine.generate([Request(prompt, num_tokens, temperature=0.0)])[0].tokens


@browser_tests
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vintage", FAMILY)
def test_logits_equal_those_of_the_model_with_the_same_weights(open_page, golden_tokenizer, vintage, backend):
    # The window of the short layers, 128, is shorter than the text, which is longer than two tiles of 64 keys.
    sizes = {"sequence_len": 512, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 48, "window_pattern": "S"}
    model = tiny_gpt(**FAMILY[vintage] | sizes)
    page = open_page(source(model, golden_tokenizer), backend)
    tokens = torch.randint(0, 1024, (1, 140), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = dequantized(model)(tokens)[0]
    logits = page.evaluate(
        """async tokens => {
          const logits = [];
          for (const [i, token] of tokens.entries()) {
            const isWanted = i < 3 || i % 46 === 0 || i === tokens.length - 1;
            const result = await localModel.generator.backend.step(token, i ? tokens[i - 1] : -1, i, isWanted);
            if (isWanted) logits.push([i, Array.from(result)]);
          }
          return logits;
        }""",
        tokens[0].tolist(),
    )
    assert page.evaluate("localModel.generator.backend.name").lower().startswith(backend)
    for i, row in logits:
        torch.testing.assert_close(torch.tensor(row), expected[i], atol=1e-4, rtol=1e-4)


@browser_tests
def test_greedy_tokens_equal_the_engines_also_after_a_shared_prefix(open_page, golden_tokenizer):
    model = tiny_gpt(sequence_len=128)
    page = open_page(source(model, golden_tokenizer))
    dequantized(model)
    for prompt in ([1, 2, 3, 4, 5], [1, 2, 3, 9], [1, 2, 3, 9, 8, 7], [5]):
        assert generate(page, prompt, 40) == reference(model, golden_tokenizer, prompt, 40)


@browser_tests
def test_completion_ends_when_the_context_is_full(open_page, golden_tokenizer):
    model = tiny_gpt(sequence_len=32)
    page = open_page(source(model, golden_tokenizer))
    expected = reference(dequantized(model), golden_tokenizer, [1, 2], 100)
    assert generate(page, [1, 2], 100) == expected
    assert len(expected) == 31


@browser_tests
def test_sampling_follows_the_softmax_of_the_most_likely_tokens(open_page, golden_tokenizer):
    page = open_page(source(tiny_gpt(), golden_tokenizer))
    counts = page.evaluate(
        """() => {
          const counts = [0, 0, 0, 0];
          for (let i = 0; i < 4000; i++) counts[localModel.sample(Float32Array.of(1, 0, 2, 1.5), .5, 3)]++;
          return counts;
        }"""
    )
    weights = torch.tensor([1.0, -torch.inf, 2.0, 1.5]).div(0.5).softmax(0)
    assert counts[1] == 0
    assert counts == pytest.approx((4000 * weights).tolist(), abs=160)  # 5 standard deviations


@browser_tests
@pytest.mark.parametrize("pattern", [SPLIT_PATTERN, PORTABLE_SPLIT_PATTERN])
def test_tokenizer_encodes_as_ours(open_page, golden_tokenizer, pattern):
    tokenizer = Tokenizer(pattern, {token: i for i, token in enumerate(golden_tokenizer.tokens)})
    rng = random.Random(0)
    alphabets = [
        "abc XYZ",
        "0123٣½",
        " \t\r\n\x0b\x85\u00a0\u3000\ufeff",
        "'s'LL'ſ'Re",
        "éß日本語ไทย",
        "😀👩\u200d👧",
        "<|bos|>#!",
    ]
    texts = ["".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randint(1, 24))) for _ in range(2000)]
    texts += ["", "x" * 500, " " * 500 + "x", "<|assistant_end|>", "lone \ud83d surrogate"]
    page = open_page(source(tiny_gpt(), tokenizer))
    page.evaluate("texts => { globalThis.ids = texts.map(text => localModel.tokenizer.encode(text)); }", texts[:-1])
    assert page.evaluate("ids") == [tokenizer.encode(text) for text in texts[:-1]]
    assert page.evaluate("localModel.tokenizer.encode('lone \\ud83d surrogate')") == tokenizer.encode(texts[-1])
    cut = tokenizer.encode("日本")[:-1] + [tokenizer.bos]
    assert page.evaluate("ids => localModel.tokenizer.decode(ids)", cut) == tokenizer.decode(cut)


EXPRESSIONS = """
1+2*3 | 7-8-9 | (1+2)*3 | 1,200 * 3 / 4 | 48/2 | 0.07*100 | 9999999999999/3 | 10000000000000/3 | 1/8 | 1/3
-7//2 | -7%3 | 7%-3 | -7.5%2 | 7.//2 | .5+.5 | 1/0 | 1%0 | 2**3 | 1e5 | 0x10 | 1_000 | 007 | 00 | 07.5 | 1,2
12,34 | 1 2 | 1+ | (1 | 1) | () | 'strawberry'.count('r') | "a,b".count(',') | 'aaaa'.count('aa')
'é😀'.count('') | 'a' 'b'.count('ab') | r'a'.count('a',) | b'a'.count(b'a') | 'a'.count('a')+1 | 'a'.count
'a'.upper() | 'a'*3 | 'a'.count(1) | '''x'''.count("x") | 'a' . count ( 'a' ) | 1 # a comment | --1 | +-+1
~1 | not 1 | 1<2 | x | __import__('os') | 10000000000*10000000000*10000000000
10000000000*10000000000*100000000000 | 0.1*0.1*0.1 | 2/3*1000000000000 | 22/7 | 1/1000000007
5/1000000000000000000000000000001
""".replace("\n", " | ")


@browser_tests
def test_calculator_computes_as_ours(open_page, golden_tokenizer):
    expressions = [expression.strip() for expression in EXPRESSIONS.split(" | ")]
    expressions += ["(1\n+2)", "1\n+2", "", " \x1f7 ", "'\\n'.count('n')", "1" * 300, "1" * 31, "1+\x002"]
    for length in (99, 100, 101, 149):
        expressions += ["-" * length + "1", "+".join(["1"] * length), "(" * length + "1" + ")" * length]
    rng = random.Random(0)
    for _ in range(2000):
        numbers = [f"{rng.choice([1, -1]) * rng.getrandbits(rng.randint(1, 60))}" for _ in range(3)]
        first, second = rng.choices(["+", "-", "*", "/", "//", "%"], k=2)
        expressions.append(f"{numbers[0]}.{rng.randint(0, 99)}{first}({numbers[1]}{second}{numbers[2]})")
    page = open_page(source(tiny_gpt(), golden_tokenizer))
    results = page.evaluate("expressions => expressions.map(localModel.calculate)", expressions)
    wrong = [(e, got, calculate(e)) for e, got in zip(expressions, results, strict=True) if got != calculate(e)]
    assert not wrong
    assert sum(result is not None for result in results) > 1000


@browser_tests
def test_prompts_equal_those_of_the_server(open_page, golden_tokenizer):
    call = [
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "It is 2."},
    ]
    messages = conversation("one and one?", call, "and <|bos|>?", [{"type": "text", "text": "no"}], "last")["messages"]
    page = open_page(source(tiny_gpt(), golden_tokenizer))
    script = "([messages, context, max]) => localModel.renderToFit(messages, localModel.tokenizer, context, max)"
    for context, max_tokens in ((200, 30), (60, 30), (60, 100), (40, 10)):
        prompt, dropped = render_to_fit({"messages": messages}, golden_tokenizer, context, max_tokens)
        result = page.evaluate(script, [messages, context, max_tokens])
        assert result == {"prompt": prompt, "dropped": dropped}
    assert page.evaluate(script, [messages, 4, 2]) is None


# ---- the page ----


def chain_model(tokenizer, text, *, loops=False):
    """
    A model that continues <|assistant_start|> with this text, in which no token may occur twice, whatever came before:
    its blocks are the identity, and lm_head maps the embedding of a token to the next one. Names of special tokens
    in the text are these. With `loops`, it repeats the text.
    """
    specials = [tokenizer.special(f"<|{name}|>") for name in ("assistant_start", "assistant_end")]
    chain = [specials[0]]
    for piece in re.split(r"(<\|\w+\|>)", text):
        chain += [tokenizer.special(piece)] if piece.startswith("<|") else tokenizer.encode(piece)
    assert len(set(chain)) == len(chain)
    model = tiny_gpt(initial=True, sequence_len=20_000, n_embd=128, n_head=2)
    embeddings = model.transformer.wte.weight.detach()
    model.lm_head.weight.detach().zero_()
    for token, following in zip(chain, [*chain[1:], chain[1] if loops else specials[1]], strict=True):
        model.lm_head.weight.detach()[following] += embeddings[token]
    return model


def ask(page, message=QUESTION):
    page.get_by_label("Your message").fill(message)
    page.keyboard.press("Enter")


def finish(page):
    """Waits for the response and returns its text."""
    page.get_by_role("button", name="Send", exact=True).wait_for()
    return page.locator("article.assistant").last.inner_text()


CALL = "So: <|python_start|>6*7<|python_end|><|output_end|> the answer."


@browser_tests
@pytest.mark.parametrize("backend", BACKENDS)
def test_page_shows_tool_calls_size_and_backend(open_page, golden_tokenizer, backend):
    page = open_page(source(chain_model(golden_tokenizer, CALL), golden_tokenizer), backend)
    ask(page)
    response = re.sub(r"\s+", " ", finish(page))
    assert response.startswith("So: 6*7 → 42 the answer.")
    assert re.search(r"\d+ tokens · .*first token \d+ ms", response)
    hint = page.locator("#hint").inner_text().lower()
    assert hint.startswith("tiny: ") and "parameters in 8 bits" in hint and f"· {backend}" in hint


@browser_tests
def test_stop_ends_the_response_and_the_next_one_works(open_page, golden_tokenizer):
    page = open_page(source(chain_model(golden_tokenizer, "la", loops=True), golden_tokenizer))
    ask(page)
    page.locator("article.assistant", has_text="lalalala").wait_for()
    page.get_by_role("button", name="Stop", exact=True).click()
    assert "Stopped." in finish(page)
    ask(page)
    page.locator("article.assistant", has_text="lalalala").nth(1).wait_for()
    page.keyboard.press("Escape")
    assert "Stopped." in finish(page)


@browser_tests
def test_long_response_shows_its_speed(open_page, golden_tokenizer):
    page = open_page(source(chain_model(golden_tokenizer, "la", loops=True), golden_tokenizer))
    page.evaluate("settings.max_tokens = 1000")
    ask(page)
    assert re.search(r"1,000 tokens · [\d,]+ tokens/s · first token", finish(page))


@browser_tests
def test_conversations_of_two_models_are_kept_apart(open_page, golden_tokenizer):
    model = chain_model(golden_tokenizer, "yes")
    first = open_page(source(model, golden_tokenizer, tag="one"))
    ask(first)
    finish(first)
    second = open_page(source(model, golden_tokenizer, tag="two"))
    assert first.locator("#list a").all_inner_texts() == [QUESTION]
    assert second.locator("#list a").all_inner_texts() == []


@browser_tests
def test_software_gpu_is_not_chosen_by_itself(open_page, golden_tokenizer):
    page = open_page(source(tiny_gpt(), golden_tokenizer), backend="")
    assert page.locator("#hint").get_attribute("title") == "No GPU: WebGPU has a software adapter only"


@browser_tests
def test_page_continues_without_the_gpu_when_it_is_lost(open_page, golden_tokenizer):
    page = open_page(source(chain_model(golden_tokenizer, "yes"), golden_tokenizer), "webgpu")
    page.evaluate(
        "async () => { const { device } = localModel.generator.backend; device.destroy(); await device.lost; }"
    )
    ask(page)
    assert "The GPU has failed" in finish(page)
    ask(page)
    assert finish(page).startswith("yes")
    assert "JavaScript" in page.locator("#hint").inner_text()


@browser_tests
def test_incomplete_file_is_reported(open_page, golden_tokenizer, tmp_path):
    html.write(source(tiny_gpt(), golden_tokenizer), tmp_path / "chat.html")
    content = (tmp_path / "chat.html").read_bytes()
    stop = len(content) * 7 // 8
    while len(content[content.rindex(b">", 0, stop) + 1 : stop].strip()) % 4 != 1:  # no bytes in base64
        stop -= 1
    (tmp_path / "chat.html").write_bytes(content[:stop])
    page = open_page(tmp_path / "chat.html")
    banner = page.locator("#banner")
    banner.wait_for()
    assert "The model cannot be loaded: the file is incomplete" in banner.inner_text()
    ask(page)
    assert "the file is incomplete" in finish(page)


@browser_tests
def test_page_cannot_connect_to_anywhere(open_page, golden_tokenizer):
    page = open_page(source(tiny_gpt(), golden_tokenizer))
    policy = page.locator("meta[http-equiv]").get_attribute("content")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    outcome = page.evaluate(
        """() => new Promise(resolve => {
          addEventListener('securitypolicyviolation', event => resolve(event.effectiveDirective));
          const request = new XMLHttpRequest();
          request.open('GET', 'http://127.0.0.1:9/');
          request.send();
        })"""
    )
    assert outcome == "connect-src"
