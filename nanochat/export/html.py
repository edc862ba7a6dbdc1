"""
Export to a single HTML file that chats with the model in any browser: offline, without a server, also from file://.

The file is the page of the web chat (nanochat/serve/ui.html) with three additions: scripts that answer its requests
(html_files/), a description of the model in JSON, and the weights in base64. Matrices and tables have 8 bits with one
scale per row, as in packed.PackedLinear; gates and scalars, 0.1 % of the parameters, stay in float32.

html_files/ in the order of the page: tokenizer.js, calculator.js and conversation.js are those of nanochat/*.py again;
weights.js decodes the weights; javascript.js runs the model on the CPU and webgpu.js, with kernels.wgsl, on a GPU;
generate.js samples; server.js connects all of it to the page.
"""

import base64
import functools
import hashlib
import html
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tiktoken
import torch

from nanochat.common import UserError, human
from nanochat.export.common import Format, Source
from nanochat.export.hf import TABLES
from nanochat.gpt import VE_GATE_SCALE, GPTConfig
from nanochat.tokenizer import NUM_BYTES, SPECIAL_TOKENS, SPLIT_PATTERN

FILES = Path(__file__).parent / "html_files"
PAGE = Path(__file__).parent.parent / "serve" / "ui.html"
SCRIPTS = ("tokenizer", "calculator", "conversation", "weights", "javascript", "webgpu", "generate", "server")

CHUNK_BYTES = 12_000_000  # of weights per <script> element; a multiple of 3, so that base64 needs no padding within
COLUMNS_MULTIPLE = 4  # a GPU reads four 8-bit weights as one word
FIXED_BYTES = 2_000_000  # upper bound for everything but the weights and the tokens
TOKEN_BYTES = 40  # the same for a token: its bytes in base64, on average over a vocabulary

# The digits that a token may have in patterns of nanochat's kind (tokenizer.SPLIT_PATTERN).
NUMBERS = (r"\p{N}{1,2}", r"\p{N}{1,3}", r"\p{N}")


# ---- weights ----


def is_matrix(name: str, weight: torch.Tensor) -> bool:
    """Whether the parameter is stored in 8 bits. Gates are not: they have 12 or 24 columns and decide much."""
    return weight.ndim == 2 and "gate" not in name


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, C) → int8 (R, C) and float32 scales (R,), whose products are the weight to 1/254 of each row's maximum."""
    scales = weight.abs().amax(dim=1).clamp_min(1e-12) / 127
    return (weight / scales[:, None]).round().to(torch.int8), scales


def parameters(source: Source) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, float32 tensor) of each parameter, tables without the padding of the vocabulary."""
    for name, weight in source.weights.items():
        if name.startswith(TABLES):
            weight = source.unpad(weight)
        yield name, weight


def layout(source: Source) -> tuple[dict[str, dict[str, int]], int]:
    """Where weights.js finds each parameter: byte offsets and sizes by name, and the number of bytes of all."""
    tensors: dict[str, dict[str, int]] = {}
    offset = 0
    for name, weight in parameters(source):
        if is_matrix(name, weight):
            rows, columns = weight.shape
            scales = offset + rows * columns
            tensors[name] = {"offset": offset, "rows": rows, "columns": columns, "scales": scales}
            offset = scales + 4 * rows
        else:
            tensors[name] = {"offset": offset, "length": weight.numel()}
            offset += 4 * weight.numel()
    return tensors, offset


def weight_bytes(source: Source) -> Iterator[bytes]:
    """The bytes of the parameters in the order of `layout`, little-endian as in all browsers."""
    by_name = dict(parameters(source))
    for name in source.track(list(by_name), "quantizing"):
        weight = by_name[name]
        if is_matrix(name, weight):
            values, scales = quantize(weight)
            yield values.numpy().tobytes()
            weight = scales
        yield weight.numpy().astype("<f4").tobytes()


def in_chunks(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The same bytes in pieces of this size; the last one may be shorter."""
    buffer = bytearray()
    for piece in pieces:
        buffer += piece
        while len(buffer) >= size:
            yield bytes(buffer[:size])
            del buffer[:size]
    if buffer:
        yield bytes(buffer)


# ---- the description of the model ----


def describe_config(config: GPTConfig) -> dict[str, Any]:
    """The sizes and constants that the scripts need; the names of the parameters show the features."""
    return {
        "channels": config.n_embd,
        "hiddenSize": 4 * config.n_embd,
        "numLayers": config.n_layer,
        "middleLayer": config.n_layer // 2,
        "numHeads": config.n_head,
        "headSize": config.head_dim,
        "kvWidth": config.kv_width,
        "context": config.sequence_len,
        "windows": config.windows,
        "vocabSize": config.vocab_size,
        "qkGain": config.qk_gain,
        "ropeBase": config.rope_base,
        "softcap": config.logit_softcap,
        "valueGateScale": VE_GATE_SCALE,
    }


def describe(source: Source) -> dict[str, Any]:
    tensors, num_weight_bytes = layout(source)
    tokenizer = source.tokenizer
    return {
        "name": source.checkpoint.tag,
        "numParameters": human(sum(weight.numel() for _, weight in parameters(source))),
        "config": describe_config(source.config),
        "tokenizer": {
            "pattern": javascript_pattern(tokenizer.pattern),
            "tokens": [base64.b64encode(token).decode() for token in tokenizer.tokens],
            "specialTokens": SPECIAL_TOKENS,
        },
        "tensors": tensors,
        "numBytes": num_weight_bytes,
    }


def is_known_pattern(pattern: str) -> bool:
    return pattern in [SPLIT_PATTERN.replace(NUMBERS[0], digits) for digits in NUMBERS]


def javascript_pattern(pattern: str) -> str:
    """
    The split pattern as a JavaScript regular expression (flag u) with the same matches, if it is a known one.

    - JavaScript has no possessive quantifiers. In these patterns what follows them cannot match what they match, so
      that giving characters back never helps.
    - Not all browsers have (?i:…). It also matches the long s, which Unicode counts as a small letter of S.
    - Each class is written out as ranges of code points: JavaScript's white space differs, and browsers, tiktoken
      and the crate in rustbpe/ may know different versions of Unicode.
    """
    assert is_known_pattern(pattern)
    pattern = pattern.replace("(?i:[sdmt]|ll|ve|re)", r"(?:[sdmtSDMT\u017f]|[lL][lL]|[vV][eE]|[rR][eE])")
    pattern = pattern.replace("?+", "?").replace("++", "+").replace(r"\S", r"[^\s]")
    for name in (r"\p{L}", r"\p{N}", r"\s"):
        pattern = write_out_class(pattern, name)
    return pattern


def write_out_class(pattern: str, name: str) -> str:
    """Replaces a class such as \\p{L} by ranges of code points, inside brackets or alone."""
    ranges = as_ranges(matching_characters(name))

    def write_out(match: re.Match[str]) -> str:
        is_bracket = match[0].startswith("[")
        return match[0].replace(name, ranges) if is_bracket else f"[{ranges}]"

    return re.sub(rf"\[[^\]]*\]|{re.escape(name)}", write_out, pattern)


@functools.cache
def matching_characters(character_class: str) -> str:
    """All characters of a class such as \\p{L}, as the tokenizer's own regular expressions understand it."""
    single_bytes = {bytes([byte]): byte for byte in range(NUM_BYTES)}
    encoding = tiktoken.Encoding("class", pat_str=character_class, mergeable_ranks=single_bytes, special_tokens={})
    characters = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    return bytes(encoding.encode_ordinary(characters)).decode()  # what matches nowhere gets no tokens


def as_ranges(characters: str) -> str:
    r"""
    Characters in ascending order as the content of a character class.

    >>> as_ranges("abcx")
    '\\u{61}-\\u{63}\\u{78}-\\u{78}'
    """
    ranges: list[list[int]] = []
    for code in map(ord, characters):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\u{{{first:x}}}-\\u{{{last:x}}}" for first, last in ranges)


# ---- the file ----


def check(source: Source) -> None:
    """UserError for a tokenizer whose pattern the page cannot reproduce, or sizes that its kernels do not support."""
    if not is_known_pattern(source.tokenizer.pattern):
        raise UserError("--to html knows the split patterns of nanochat, this tokenizer has another: use --to hf")
    for name, size in (("n_embd", source.config.n_embd), ("n_kv_head * head_dim", source.config.kv_width)):
        if size % COLUMNS_MULTIPLE:
            raise UserError(f"--to html needs sizes that are multiples of 4, {name} is {size}: use --to hf")


def num_bytes(source: Source) -> int:
    """Upper bound for the size of the file."""
    _, num_weight_bytes = layout(source)
    return num_weight_bytes * 4 // 3 + TOKEN_BYTES * source.config.vocab_size + FIXED_BYTES


def write(source: Source, path: Path) -> None:
    """Writes the file."""
    before, after = page(source)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(before)
        for chunk in in_chunks(weight_bytes(source), CHUNK_BYTES):
            file.write(f'<script type="text/plain" class="weights">{base64.b64encode(chunk).decode()}</script>\n')
        file.write(after)


def page(source: Source) -> tuple[str, str]:
    """The page before and after the weights. They come last, so that it appears while they are being read."""
    text = PAGE.read_text(encoding="utf-8")
    page_script = text.partition("<script>")[2].partition("</script>")[0]
    model_script = join_scripts()
    policy = content_policy([model_script, page_script])
    checkpoint = source.checkpoint
    identity = html.escape(f"{checkpoint.tag} {source.stage} {checkpoint.step}")
    description = json.dumps(describe(source), separators=(",", ":")).replace("<", "\\u003c")
    kernels = (FILES / "kernels.wgsl").read_text(encoding="utf-8")
    additions = (
        f'<script type="application/json" id="model">{description}</script>\n'
        f'<script type="text/plain" id="kernels">\n{kernels}</script>\n'
        f"<script>{model_script}</script>\n"
    )
    text = replace_once(text, 'content="require-trusted', f'content="{policy}; require-trusted')
    text = replace_once(text, '<html lang="en">', f'<html lang="en" data-model="{identity}">')
    text = replace_once(text, "<script>", f"{additions}<script>")
    before, end, after = text.partition("</body>")
    return before, end + after


def join_scripts() -> str:
    """The scripts as one, in a function, so that its names do not collide with those of the page's own script."""
    sources = [(FILES / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    return "\n(() => {\n'use strict';\n\n" + "\n".join(sources) + "})();\n"


def content_policy(scripts: list[str]) -> str:
    """A Content-Security-Policy that allows these scripts and no connection to anywhere."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def replace_once(text: str, old: str, new: str) -> str:
    """Replaces a text that must occur; the first occurrence only."""
    assert old in text, f"{PAGE} has no {old}"
    return text.replace(old, new, 1)


FORMAT = Format(dtypes=("int8",), check=check, num_bytes=num_bytes, write=write)
