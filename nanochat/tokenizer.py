"""
Byte-level BPE in the manner of GPT-4: trained and run by rustbpe, or run by tiktoken, stored as plain data.

    tokenizer = Tokenizer.train(texts, vocab_size=32768)
    tokenizer.save(default_dir())
    ids = Tokenizer.load(default_dir()).encode("hello")     # begins with no bos: say so with tokenizer.bos
"""

import base64
import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tiktoken
import torch

from nanochat import legacy
from nanochat.common import UserError, atomic_path, base_dir

# Their ids follow the ordinary vocabulary in this order. In text they are plain characters: encode() never gives one.
SPECIAL_TOKENS = (
    "<|bos|>",  # begins every document and every conversation
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the calculator
    "<|python_end|>",
    "<|output_start|>",  # what the calculator answers
    "<|output_end|>",
)

# GPT-4's pattern with \p{N}{1,2} for {1,3}: three digits at a time would take too much of a small vocabulary.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# Splits every digit apart. Programs such as llama.cpp know a fixed list of patterns, and this one is in it.
PORTABLE_SPLIT_PATTERN = SPLIT_PATTERN.replace(r"\p{N}{1,2}", r"\p{N}")

NUM_BYTES = 256
FORMAT, VERSION = "nanochat-tokenizer", 1
FILE_NAME, PICKLE_NAME = "tokenizer.json", "tokenizer.pkl"
# tiktoken's regex engine panics on runs of about 10^6 spaces (measured, 0.14), so longer texts are encoded in blocks.
MAX_BLOCK = 400_000  # characters


def default_dir() -> Path:
    """Where the tokenizer of this user's models lives."""
    return base_dir() / "tokenizer"


class Tokenizer:
    """
    Text to token ids and back. Safe to share between threads.

    pattern: the regex that cuts text into the pieces within which bytes are merged
    ranks:   token's bytes → id; every single byte is in it and the ids are 0 … n-1, ValueError otherwise
    """

    def __init__(self, pattern: str, ranks: Mapping[bytes, int] | Iterable[tuple[bytes, int]]) -> None:
        ranks = dict(ranks)
        self.pattern = pattern
        self.tokens = sorted(ranks, key=ranks.__getitem__)  # id → bytes, without the special tokens
        if [ranks[token] for token in self.tokens] != list(range(len(ranks))):
            raise ValueError("the ids of the tokens are not 0, 1, 2, …")
        if any(bytes([byte]) not in ranks for byte in range(NUM_BYTES)):
            raise ValueError("some single bytes have no token")
        self._special_ids = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            "nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self._special_ids
        )
        self._fast = fast_encoder(pattern, self.tokens)
        self.vocab_size = len(ranks) + len(SPECIAL_TOKENS)
        self.bos = self.special("<|bos|>")

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        pattern: str = SPLIT_PATTERN,
        progress: Callable[[int, int], object] | None = None,
    ) -> "Tokenizer":
        """
        Learns vocab_size tokens, special ones included, and calls progress(merges done, merges in all) meanwhile if
        our rustbpe is installed. UserError if the tokens are too few, or too many for the texts.
        """
        import rustbpe  # only training needs it

        smallest = NUM_BYTES + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise UserError(f"a vocabulary of {vocab_size} is too small: {smallest} hold the bytes and special tokens")
        trainer = rustbpe.Tokenizer()
        has_progress = hasattr(trainer, "from_tokens")  # the published wheel has neither
        options: dict[str, Any] = {"progress": progress} if has_progress else {}
        try:
            trainer.train_from_iterator(iter(texts), vocab_size - len(SPECIAL_TOKENS), pattern=pattern, **options)
        except UnicodeEncodeError as error:
            raise UserError(f"a text is not valid Unicode, clean it or leave it out: {error}") from error
        tokenizer = cls(pattern, trainer.get_mergeable_ranks())
        if tokenizer.vocab_size < vocab_size:
            raise UserError(
                f"the text has merges for a vocabulary of {tokenizer.vocab_size} only, not {vocab_size}: "
                "train on more text or ask for fewer tokens"
            )
        return tokenizer

    def special(self, name: str) -> int:
        """The id of a special token, such as "<|bos|>"; KeyError for any other name."""
        return self._special_ids[name]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, never a special one. Lone surrogates, which are no characters, become U+FFFD."""
        if self._fast is not None:
            try:
                return self._fast.encode(text)
            except UnicodeEncodeError:
                return self._fast.encode(without_surrogates(text))
        if len(text) <= MAX_BLOCK:
            return self._encoding.encode_ordinary(text)
        blocks = (text[start : start + MAX_BLOCK] for start in range(0, len(text), MAX_BLOCK))
        return [token for block in blocks for token in self._encoding.encode_ordinary(block)]

    def encode_batch(self, texts: Sequence[str], num_threads: int = 4) -> list[list[int]]:
        """encode() of each text, on several threads."""
        if self._fast is not None:
            try:
                return self._fast.batch_encode(texts, threads=num_threads)
            except UnicodeEncodeError:
                return self._fast.batch_encode([without_surrogates(text) for text in texts], threads=num_threads)
        with ThreadPoolExecutor(num_threads) as pool:  # tiktoken releases the GIL
            return list(pool.map(self.encode, texts))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens show their names, bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids; KeyError for an id outside the vocabulary."""
        return self._encoding.decode_bytes(ids)

    def token_bytes(self) -> torch.Tensor:
        """Bytes per token, int32 (vocab_size,), 0 for special tokens: what bits per byte divides by."""
        return torch.tensor([len(token) for token in self.tokens] + [0] * len(SPECIAL_TOKENS), dtype=torch.int32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that name this tokenizer: a checkpoint can tell which one it was trained with."""
        return hashlib.sha256(json.dumps(self._to_data(), sort_keys=True).encode()).hexdigest()[:16]

    def save(self, directory: Path) -> None:
        """
        Writes tokenizer.json into the folder. Another tokenizer that is there is kept as tokenizer.<fingerprint>.json:
        models that were trained with it are worth nothing without.
        """
        path = Path(directory) / FILE_NAME
        with contextlib.suppress(OSError, ValueError):
            if (there := self._from_json(path.read_bytes()).fingerprint) != self.fingerprint:
                path.rename(path.with_name(f"tokenizer.{there}.json"))
        with atomic_path(Path(directory) / FILE_NAME) as path:
            path.write_text(json.dumps({"format": FORMAT, "version": VERSION, **self._to_data()}))

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Reads what save() wrote or, if there is only that, a tokenizer.pkl. UserError: none there, or a bad one."""
        path, pickled = Path(directory) / FILE_NAME, Path(directory) / PICKLE_NAME
        if path.exists():
            read = cls._from_json
        elif pickled.exists():
            path, read = pickled, cls._from_pickle
        else:
            raise UserError(f"no tokenizer in {directory}: train one with `python -m scripts.tok_train`")
        try:
            return read(path.read_bytes())
        except ValueError as error:
            raise UserError(
                f"{path} is no usable tokenizer ({error}): restore it, or train anew with `python -m scripts.tok_train`"
            ) from error

    def _to_data(self) -> dict[str, Any]:
        return {
            "pattern": self.pattern,
            "special_tokens": SPECIAL_TOKENS,
            "tokens": [base64.b64encode(token).decode() for token in self.tokens],  # by id
        }

    @classmethod
    def _from_json(cls, content: bytes) -> "Tokenizer":
        data = json.loads(content)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        if data.get("version") != VERSION:
            raise ValueError(f"version {data.get('version')}, this code reads {VERSION}")
        try:
            ranks = {base64.b64decode(token, validate=True): i for i, token in enumerate(data["tokens"])}
            pattern, special_tokens = data["pattern"], data["special_tokens"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"a part is missing or malformed: {error}") from error
        if special_tokens != list(SPECIAL_TOKENS) or not isinstance(pattern, str):
            raise ValueError(f"its special tokens are not {', '.join(SPECIAL_TOKENS)}, or it has no pattern")
        return cls(pattern, ranks)

    @classmethod
    def _from_pickle(cls, content: bytes) -> "Tokenizer":
        pattern, ranks, special_tokens = legacy.read_encoding_pickle(content)
        if special_tokens != {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}:
            raise ValueError(f"its special tokens are not {', '.join(SPECIAL_TOKENS)} right after the others")
        return cls(pattern, ranks)


def fast_encoder(pattern: str, tokens: list[bytes]) -> Any:
    """
    Our rustbpe as an encoder: the ids of tiktoken at 4 times its speed (batches of 128 documents, 2 cores: 60 against
    14 MB/s). None, and tiktoken encodes, where only the published wheel is installed or the pattern is another one.
    """
    import rustbpe

    if not hasattr(rustbpe.Tokenizer, "from_tokens"):
        return None
    try:
        return rustbpe.Tokenizer.from_tokens(tokens, pattern)
    except ValueError:
        return None


def without_surrogates(text: str) -> str:
    """Pairs of surrogates become the character that they stand for, lone ones U+FFFD: what tiktoken does."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def bytes_per_token(encode: Callable[[str], list[int]], texts: Sequence[str]) -> float:
    """Compression of the texts: their UTF-8 bytes over their tokens. More is better."""
    return sum(len(text.encode()) for text in texts) / sum(len(encode(text)) for text in texts)
