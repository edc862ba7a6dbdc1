"""
Our tokenizer as a fast tokenizer of Hugging Face, and back: both compute the same ids for every text.

The library `tokenizers` describes byte-level BPE by pairs of tokens (merges) and writes each byte as a printable
character, as GPT-2 did. Special tokens are ordinary text to our Tokenizer.encode. To a Hugging Face tokenizer they are
special wherever they occur, because chat templates depend on it; `split_special_tokens=True` switches that off.
"""

import json
import re
from pathlib import Path
from typing import Any

from nanochat.common import UserError, parse_json
from nanochat.tokenizer import NUM_BYTES, SPECIAL_TOKENS, Tokenizer

CHAT_TEMPLATE = Path(__file__).with_name("hf_files") / "chat_template.jinja"

# In the regex engine of tiktoken, `\p{N}{1,3}+` never gives back what it matched (possessive). In that of `tokenizers`,
# it means one or more times {1,3}, and the group (?>…) is possessive.
POSSESSIVE = re.compile(r"(\\p\{\w+\}\{\d+,\d+\})\+")
ATOMIC = re.compile(r"\(\?>(\\p\{\w+\}\{\d+,\d+\})\)")


def byte_characters() -> list[str]:
    """The printable character that stands for each byte: itself if it is one in Latin-1, otherwise one from U+0100."""
    characters = []
    num_unprintable = 0
    for byte in range(NUM_BYTES):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xFF and byte != 0xAD:
            characters.append(chr(byte))
        else:
            characters.append(chr(0x100 + num_unprintable))
            num_unprintable += 1
    return characters


def merges(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """
    The pair of tokens that each token of several bytes was merged from, in the order of the ids. ValueError if there is
    a token that no pair makes.

    The pair is what remains when the token is encoded with the tokens before it.
    """
    ranks = {token: i for i, token in enumerate(tokens)}
    pairs = []
    for i, token in enumerate(tokens):
        if len(token) == 1:
            continue
        parts = _encode_with_tokens_before(token, i, ranks)
        if len(parts) != 2:
            raise ValueError(f"token {i}, {token!r}, is not the merge of two tokens")
        pairs.append((parts[0], parts[1]))
    return pairs


def _encode_with_tokens_before(token: bytes, limit: int, ranks: dict[bytes, int]) -> list[bytes]:
    """BPE: merges the pair with the lowest id, again and again, as long as that id is below the limit."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 1:
        candidates = [ranks.get(parts[i] + parts[i + 1], limit) for i in range(len(parts) - 1)]
        lowest = min(candidates)
        if lowest >= limit:
            break
        i = candidates.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json. UserError if the tokens cannot be written as merges."""
    characters = byte_characters()

    def as_text(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    try:
        pairs = merges(tokenizer.tokens)
    except ValueError as error:
        raise UserError(f"the tokenizer cannot be exported ({error}): train one with scripts.tok_train") from error
    added = []
    for name in SPECIAL_TOKENS:
        options = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        added.append({"id": tokenizer.special(name), "content": name, **options})
    pattern = POSSESSIVE.sub(r"(?>\1)", tokenizer.pattern)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True, "use_regex": True},  # the library's defaults; no effect
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {as_text(token): i for i, token in enumerate(tokenizer.tokens)},
            "merges": [[as_text(left), as_text(right)] for left, right in pairs],
        },
    }


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, sequence_len: int, end_token: str) -> None:
    """
    Writes the files that AutoTokenizer loads. end_token is the special token that ends what the model generates.

    Padding uses <|bos|>: it occurs only at the start of a row, so that masking it out of a loss hides no end token.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": end_token,
        "pad_token": "<|bos|>",
        "additional_special_tokens": [name for name in SPECIAL_TOKENS if name not in ("<|bos|>", end_token)],
        "model_max_length": sequence_len,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    _write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
    _write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder. UserError if there is none, or if it is not of our kind."""
    file = folder / "tokenizer.json"
    if not file.exists():
        raise UserError(f"{folder} has no tokenizer.json: download all files of the model")
    try:
        data = parse_json(file.read_bytes())
        return _from_json(data)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else error
        raise UserError(
            f"{file} is not the tokenizer of a nanochat model ({problem}): import another folder"
        ) from error


def _from_json(data: dict[str, Any]) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes. An error of ValueError, LookupError or TypeError if it is none."""
    model = data["model"]
    if model["type"] != "BPE":
        raise ValueError(f"its type is {model['type']}, not BPE")
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    special_ids = {token["content"]: token["id"] for token in data["added_tokens"]}
    ranks = {}
    for text, i in model["vocab"].items():
        if text not in special_ids:
            ranks[bytes(byte_of[character] for character in text)] = i
    expected = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    if special_ids != expected:
        raise ValueError(f"its special tokens are not {', '.join(SPECIAL_TOKENS)} right after the others")
    tokenizer = Tokenizer(_find_pattern(data["pre_tokenizer"]), ranks)
    if data.get("normalizer"):
        raise ValueError("it normalizes texts")
    check_merges(model["merges"], tokenizer.tokens)
    return tokenizer


def check_merges(saved: list[Any], tokens: list[bytes]) -> None:
    """
    ValueError unless a tokenizer.json with these merges encodes as our tokenizer with these tokens does: the merges are
    in the order of the ids of what they make, and complete. Other converters list every pair that makes a token, not
    only the one that BPE uses.
    """
    characters = byte_characters()
    ids = {"".join(characters[byte] for byte in token): i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in saved]
    made = [ids[left + right] for left, right in pairs]
    used = set(merges(tokens))
    found = {(tokens[ids[left]], tokens[ids[right]]) for left, right in pairs}
    if made != sorted(made) or not used <= found:
        raise ValueError("its merges do not follow from the ids of its tokens")


def _find_pattern(pre_tokenizer: dict[str, Any]) -> str:
    """The regular expression of the Split step. ValueError unless the other step is ByteLevel."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        raise ValueError("it does not split by a regular expression and then into bytes")
    return ATOMIC.sub(r"\1+", steps[0]["pattern"]["Regex"])


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
