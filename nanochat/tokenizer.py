"""
The tokenizer: text to token ids and back, by byte-level byte-pair encoding (BPE) as in GPT-4.

    tokenizer = Tokenizer.train(texts, vocab_size=32768)
    tokenizer.save(default_dir())
    ids = [tokenizer.bos, *Tokenizer.load(default_dir()).encode("hello")]     # encode() adds no special tokens

A regular expression, the split pattern, cuts text into pieces: words, numbers, punctuation, white space. At first each
UTF-8 byte is a token; these 256 tokens can spell any text. Training finds the most frequent pair of neighbouring tokens
within pieces, merges it into a new token, and repeats that until the vocabulary is full (arXiv 1508.07909, on bytes as
in GPT-2). Encoding applies these merges in the same order.

The crate in rustbpe/ trains and encodes. The package of the same name on PyPI can only train; where that one is
installed, tiktoken encodes. The tokenizer is stored as plain JSON.
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
from nanochat.common import UserError, atomic_path, base_dir, parse_json

# Their ids follow the ordinary vocabulary in this order. encode() never returns one: in a text their names are ordinary
# characters, so that users cannot forge the structure of a conversation.
SPECIAL_TOKENS = (
    "<|bos|>",  # starts every document and every conversation
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the calculator
    "<|python_end|>",
    "<|output_start|>",  # the calculator's result
    "<|output_end|>",
)

# GPT-4's pattern, but with at most two digits per token instead of three: the numbers of three digits would take up to
# 1,000 tokens of a small vocabulary.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# Splits every digit apart. Programs such as llama.cpp know a fixed list of patterns, and this one is in it.
PORTABLE_SPLIT_PATTERN = SPLIT_PATTERN.replace(r"\p{N}{1,2}", r"\p{N}")

NUM_BYTES = 256
FORMAT, VERSION = "nanochat-tokenizer", 1
FILE_NAME, PICKLE_NAME = "tokenizer.json", "tokenizer.pkl"
# tiktoken's regex engine crashes on runs of about 10^6 spaces (measured with version 0.14), so long texts are encoded
# in blocks.
MAX_BLOCK = 400_000  # characters


def default_dir() -> Path:
    """
    The folder of the tokenizers: tokenizer.json, which new base models use, and tokenizer.<fingerprint>.json of models
    that were trained with another one.
    """
    return base_dir() / "tokenizer"


class Tokenizer:
    """
    Converts text to token ids and back. Threads may share it.

    pattern: the split pattern, a regular expression; merges never cross the borders of its matches
    ranks:   bytes of each token → id. ValueError unless the ids are 0 … n-1 and every single byte has a token.
    """

    def __init__(self, pattern: str, ranks: Mapping[bytes, int] | Iterable[tuple[bytes, int]]) -> None:
        ranks = dict(ranks)
        self.pattern = pattern
        self.tokens = sorted(ranks, key=ranks.__getitem__)  # id → bytes, without the special tokens
        if [ranks[token] for token in self.tokens] != list(range(len(ranks))):
            raise ValueError("the ids of the tokens are not 0, 1, 2, …")
        if b"" in ranks or not pattern:
            raise ValueError("the split pattern or one of the tokens is empty")
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
        Learns a tokenizer of vocab_size tokens, special tokens included, from texts. Calls progress(merges done, merges
        in total) while merging, if the crate in rustbpe/ is installed. Raises UserError if vocab_size is too small for
        the bytes, or too large for the texts.
        """
        import rustbpe  # only training needs it

        smallest = NUM_BYTES + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise UserError(f"a vocabulary of {vocab_size} is too small: bytes and special tokens alone are {smallest}")
        trainer = rustbpe.Tokenizer()
        has_progress = hasattr(trainer, "from_tokens")  # PyPI's package has neither this method nor progress
        options: dict[str, Any] = {"progress": progress} if has_progress else {}
        try:
            trainer.train_from_iterator(iter(texts), vocab_size - len(SPECIAL_TOKENS), pattern=pattern, **options)
        except UnicodeEncodeError as error:
            raise UserError(f"a text is not valid Unicode, remove or repair it: {error}") from error
        tokenizer = cls(pattern, trainer.get_mergeable_ranks())
        if tokenizer.vocab_size < vocab_size:
            raise UserError(
                f"the texts are enough for a vocabulary of {tokenizer.vocab_size} only, not {vocab_size}: "
                "train on more text, or choose a smaller vocabulary"
            )
        return tokenizer

    def special(self, name: str) -> int:
        """The id of a special token, such as "<|bos|>"; KeyError for any other name."""
        return self._special_ids[name]

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, never a special token. Lone surrogates, which are not characters, become U+FFFD."""
        if self._fast is not None:
            return self._encode_fast([text], 1)[0]
        ids: list[int] = []
        for start in range(0, len(text), MAX_BLOCK):
            ids += self._encoding.encode_ordinary(text[start : start + MAX_BLOCK])
        return ids

    def encode_batch(self, texts: Sequence[str], num_threads: int = 4) -> list[list[int]]:
        """The token ids of each text, as encode() returns them, computed on several threads."""
        if self._fast is not None:
            return self._encode_fast(texts, num_threads)
        with ThreadPoolExecutor(num_threads) as pool:  # tiktoken releases the GIL
            return list(pool.map(self.encode, texts))

    def _encode_fast(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        try:
            return self._fast.batch_encode(texts, threads=num_threads)
        except UnicodeEncodeError:
            return self._fast.batch_encode([without_surrogates(text) for text in texts], threads=num_threads)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids. Special tokens appear by name, and bytes that are not valid UTF-8 as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of token ids. KeyError for an id outside the vocabulary."""
        return self._encoding.decode_bytes(ids)

    def token_bytes(self) -> torch.Tensor:
        """
        Number of bytes of each token, int32 (vocab_size,), 0 for special tokens. Bits per byte divides by these, so
        that models with different tokenizers can be compared.
        """
        lengths = [len(token) for token in self.tokens]
        lengths += [0] * len(SPECIAL_TOKENS)
        return torch.tensor(lengths, dtype=torch.int32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of 16 hexadecimal digits. Checkpoints store it, to detect that the tokenizer has changed."""
        return hashlib.sha256(json.dumps(self._to_data(), sort_keys=True).encode()).hexdigest()[:16]

    def save(self, directory: Path) -> None:
        """
        Writes tokenizer.json into the folder. A different tokenizer that is already there is renamed to
        tokenizer.<fingerprint>.json, because the models that were trained with it are useless without it.
        """
        target = Path(directory) / FILE_NAME
        with contextlib.suppress(OSError, ValueError):  # there is none, or none that can be read
            existing = self._from_json(target.read_bytes()).fingerprint
            if existing != self.fingerprint:
                target.rename(kept_file(target.parent, existing))
        with atomic_path(target) as path:
            path.write_text(self._to_json())

    def add_to(self, directory: Path) -> None:
        """
        Writes the tokenizer into the folder and leaves the one there as it is: as tokenizer.json if there is none,
        otherwise, unless it is the same, as tokenizer.<fingerprint>.json.
        """
        default = Path(directory) / FILE_NAME
        if not default.exists() and not default.with_name(PICKLE_NAME).exists():
            self.save(directory)
        elif self.find(directory, self.fingerprint) is None:
            with atomic_path(kept_file(directory, self.fingerprint)) as path:
                path.write_text(self._to_json())

    @classmethod
    def find(cls, directory: Path, fingerprint: str) -> "Tokenizer | None":
        """The tokenizer of the folder that has this fingerprint, whether it is tokenizer.json or kept beside it."""
        candidates = [kept_file(directory, fingerprint), Path(directory) / FILE_NAME, Path(directory) / PICKLE_NAME]
        for path in candidates:
            if path.exists():
                tokenizer = cls._read(path)
                if tokenizer.fingerprint == fingerprint:
                    return tokenizer
        return None

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """
        Reads tokenizer.json or, if there is none, the tokenizer.pkl of an older version. Raises UserError if the folder
        has no tokenizer or its file is damaged.
        """
        path = Path(directory) / FILE_NAME
        if not path.exists():
            path = Path(directory) / PICKLE_NAME
        if not path.exists():
            if not Path(directory).is_dir() and Path(directory).exists():
                raise UserError(f"{directory} is a file: name the folder of a tokenizer")
            raise UserError(f"no tokenizer in {directory}: train one with `python -m scripts.tok_train`")
        return cls._read(path)

    @classmethod
    def _read(cls, path: Path) -> "Tokenizer":
        """The tokenizer in a file. UserError if it is damaged."""
        try:
            if path.name == PICKLE_NAME:
                return cls._from_pickle(path.read_bytes())
            return cls._from_json(path.read_bytes())
        except ValueError as error:
            raise UserError(
                f"{path} is not a usable tokenizer ({error}): restore the file, or train a new one with "
                "`python -m scripts.tok_train`"
            ) from error

    def _to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint, **self._to_data()})

    def _to_data(self) -> dict[str, Any]:
        return {
            "pattern": self.pattern,
            "special_tokens": SPECIAL_TOKENS,
            "tokens": [base64.b64encode(token).decode() for token in self.tokens],  # by id
        }

    @classmethod
    def _from_json(cls, content: bytes) -> "Tokenizer":
        data = parse_json(content)
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
            raise ValueError(f"its special tokens are not {', '.join(SPECIAL_TOKENS)}, or its pattern is missing")
        tokenizer = cls(pattern, ranks)
        if data.get("fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:  # version 1 had none at first
            raise ValueError("its content does not match its fingerprint, so the file is damaged")
        return tokenizer

    @classmethod
    def _from_pickle(cls, content: bytes) -> "Tokenizer":
        pattern, ranks, special_tokens = legacy.read_encoding_pickle(content)
        if special_tokens != {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}:
            raise ValueError(f"its special tokens are not {', '.join(SPECIAL_TOKENS)} right after the others")
        return cls(pattern, ranks)


def kept_file(directory: Path, fingerprint: str) -> Path:
    """The file of a tokenizer that is not the default one of its folder."""
    return Path(directory) / f"tokenizer.{fingerprint}.json"


def fast_encoder(pattern: str, tokens: list[bytes]) -> Any:
    """
    Returns an encoder of the crate in rustbpe/, which computes the same ids as tiktoken at 4 times its speed (60
    instead of 14 MB/s for batches of 128 documents on 2 cores). None if PyPI's package is installed instead, or if the
    crate does not support the pattern: then tiktoken encodes.
    """
    import rustbpe

    if not hasattr(rustbpe.Tokenizer, "from_tokens"):
        return None
    try:
        return rustbpe.Tokenizer.from_tokens(tokens, pattern)
    except ValueError:
        return None


def without_surrogates(text: str) -> str:
    """Joins pairs of surrogates to the characters they stand for and replaces lone ones by U+FFFD, as tiktoken does."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def bytes_per_token(encode: Callable[[str], list[int]], texts: Sequence[str]) -> float:
    """The compression of the texts: UTF-8 bytes per token. More is better."""
    num_bytes = sum(len(text.encode()) for text in texts)
    num_tokens = sum(len(encode(text)) for text in texts)
    return num_bytes / num_tokens
