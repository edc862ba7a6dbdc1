"""
Trains byte-level BPE tokenizers on all cores. A drop-in for the package of the same name on PyPI.

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(["low lower", "lowest"], vocab_size=258)
    tokenizer.get_mergeable_ranks()[256:]   # [(b'lo', 256), (b'low', 257)]: what tiktoken.Encoding takes
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ._native import ffi, lib

__all__ = ["DEFAULT_PATTERN", "Tokenizer", "split"]

DEFAULT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
NUM_BYTES = 256
# UTF-8 bytes that each thread gets at a time: enough to make starting the threads cheap, few enough to save memory
# (heuristic, not tuned).
BYTES_PER_THREAD = 4 << 20


class Tokenizer:
    """Learns merges from text, and encodes and decodes with them. Before training it has the 256 bytes as tokens."""

    def __init__(self) -> None:
        self._pattern = DEFAULT_PATTERN
        self._tokens = [bytes([byte]) for byte in range(NUM_BYTES)]
        self._encoder: Any = None  # created on first use

    @classmethod
    def from_tokens(cls, tokens: Iterable[bytes], pattern: str = DEFAULT_PATTERN) -> "Tokenizer":
        """
        Returns a tokenizer with these tokens, in the order of their ids. Raises ValueError if a single byte has no
        token or the pattern is not supported.
        """
        tokenizer = cls()
        tokenizer._tokens, tokenizer._pattern = list(tokens), pattern
        tokenizer._encoder = tokenizer._make_encoder()
        return tokenizer

    def train_from_iterator(
        self,
        iterator: Iterable[str],
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
        *,
        threads: int | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """
        Learns up to vocab_size - 256 merges, fewer if no pair is left, which replace the current ones. If this raises,
        the current ones stay. Texts are counted in the background while the iterator produces the next ones.

        vocab_size:  number of tokens, the 256 bytes included
        buffer_size: maximum number of documents that are collected before they are counted
        pattern:     the regular expression that splits text into chunks, one of the GPT-4 family
        threads:     by default all cores; the result does not depend on it
        progress:    called as progress(merges done, merges in total) every 20 ms while merges are learned

        Raises ValueError for a vocab_size below 256, an unsupported pattern, or a text with lone surrogates
        (UnicodeEncodeError), and TypeError for a text that is not a str. Exceptions of the iterator and of progress are
        passed on, and Ctrl-C stops the training.
        """
        if vocab_size < NUM_BYTES:
            raise ValueError(f"vocab_size must be at least {NUM_BYTES}, not {vocab_size}")
        if buffer_size < 1:
            raise ValueError(f"buffer_size must be at least 1, not {buffer_size}")
        threads = threads or _num_cores()
        pattern = DEFAULT_PATTERN if pattern is None else pattern
        encoded_pattern = _checked(pattern)
        counter = lib.rustbpe_counter_new(encoded_pattern, len(encoded_pattern), threads)
        try:
            _count(counter, _buffers(iterator, buffer_size, BYTES_PER_THREAD * threads))
        except BaseException:
            lib.rustbpe_counter_free(counter)
            raise
        merges = _learn(counter, vocab_size, progress)  # frees the counter

        tokens = [bytes([byte]) for byte in range(NUM_BYTES)]
        for first, second in merges:
            tokens.append(tokens[first] + tokens[second])
        self._pattern, self._tokens, self._encoder = pattern, tokens, None

    @property
    def vocab_size(self) -> int:
        """Number of tokens: the 256 bytes and the merges."""
        return len(self._tokens)

    def get_pattern(self) -> str:
        """The regular expression that splits text into chunks."""
        return self._pattern

    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """Bytes and id of each token, in the order of the ids."""
        return [(token, rank) for rank, token in enumerate(self._tokens)]

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, the same as tiktoken's."""
        return self._encode([text], 1)[0]

    def batch_encode(self, texts: Sequence[str], *, threads: int | None = None) -> list[list[int]]:
        """The token ids of each text, computed by default on all cores."""
        return self._encode(texts, threads or _num_cores())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids. ValueError for an unknown id, UnicodeDecodeError if the bytes are not valid UTF-8."""
        parts = []
        for token in ids:
            if not 0 <= token < len(self._tokens):
                raise ValueError(f"Unknown token id: {token}")
            parts.append(self._tokens[token])
        return b"".join(parts).decode()

    def _encode(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        encoded = [_utf8(text, number) for number, text in enumerate(texts)]
        if self._encoder is None:
            self._encoder = self._make_encoder()
        rows = lib.rustbpe_encode(self._encoder, *_pointers(encoded), len(encoded), threads)
        if rows == ffi.NULL:
            raise RuntimeError("encoding failed, which is a bug in rustbpe")
        return _take_rows(rows, len(encoded))

    def _make_encoder(self) -> Any:
        pattern = _checked(self._pattern)
        encoder = lib.rustbpe_encoder_new(pattern, len(pattern), *_pointers(self._tokens), len(self._tokens))
        if encoder == ffi.NULL:
            raise ValueError("some single bytes have no token")
        return ffi.gc(encoder, lib.rustbpe_encoder_free)


def split(texts: Sequence[str], pattern: str = DEFAULT_PATTERN) -> list[list[str]]:
    """The chunks of each text, as regex.findall(pattern, text) returns them. Merges never cross chunks."""
    encoded_pattern = _checked(pattern)
    encoded = [_utf8(text, number) for number, text in enumerate(texts)]
    rows = lib.rustbpe_split(encoded_pattern, len(encoded_pattern), *_pointers(encoded), len(encoded))
    if rows == ffi.NULL:
        raise ValueError("one of the texts has more than 4 GB")
    return [
        [text[start:end].decode() for start, end in itertools.pairwise([0, *ends])]
        for text, ends in zip(encoded, _take_rows(rows, len(encoded)), strict=True)
    ]


def _checked(pattern: str) -> bytes:
    """The pattern as UTF-8. ValueError, with the supported patterns, for any other one."""
    encoded = pattern.encode(errors="replace")
    if not lib.rustbpe_supports_pattern(encoded, len(encoded)):
        supported = DEFAULT_PATTERN.replace("{1,3}", "{1,K}")
        raise ValueError(f"the pattern {pattern!r} is not supported: only GPT-4's, {supported}, with K from 1 to 3")
    return encoded


def _buffers(texts: Iterable[str], max_documents: int, max_bytes: int) -> Iterator[list[bytes]]:
    buffer, num_bytes = [], 0
    for number, text in enumerate(texts):
        encoded = _utf8(text, number)
        buffer.append(encoded)
        num_bytes += len(encoded)
        if len(buffer) == max_documents or num_bytes >= max_bytes:
            yield buffer
            buffer, num_bytes = [], 0
    if buffer:
        yield buffer


def _utf8(text: str, number: int) -> bytes:
    """A text as UTF-8. Errors mention its number, counted from 0."""
    if not isinstance(text, str):
        raise TypeError(f"document {number} is a {type(text).__name__}, not a str")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        error.reason += f" (document {number}, counted from 0)"
        raise


def _count(counter: Any, buffers: Iterator[list[bytes]]) -> None:
    def count(buffer: list[bytes]) -> None:
        if lib.rustbpe_count(counter, *_pointers(buffer), len(buffer)) != lib.RUSTBPE_OK:
            raise RuntimeError("counting failed, which is a bug in rustbpe")

    pending: Future[None] | None = None
    with ThreadPoolExecutor(1) as background:  # on exit, even by an exception, it waits for the count in progress
        for buffer in buffers:
            if pending:
                pending.result()
            pending = background.submit(count, buffer)
        if pending:
            pending.result()


def _learn(counter: Any, vocab_size: int, progress: Callable[[int, int], object] | None) -> list[tuple[int, int]]:
    raised: list[BaseException] = []

    def report(done: int, total: int) -> int:
        if progress:
            progress(done, total)
        return 1  # continue; an exception, such as Ctrl-C, returns 0 and stops the training

    callback = ffi.callback(
        "int(uintptr_t, uintptr_t)", report, error=0, onerror=lambda _type, value, _traceback: raised.append(value)
    )
    status = ffi.new("int *")
    rows = lib.rustbpe_train(counter, vocab_size, callback, status)
    if raised:
        raise raised[0]
    if status[0] == lib.RUSTBPE_TOO_LARGE:
        raise ValueError("the texts have more than 4 GB of distinct chunks: train on fewer texts")
    if status[0] != lib.RUSTBPE_OK:
        raise RuntimeError("learning the merges failed, which is a bug in rustbpe")
    flat = iter(_take_rows(rows, 1)[0])
    return list(zip(flat, flat, strict=True))


def _pointers(encoded: list[bytes]) -> tuple[Any, Any]:
    """Pointers to the bytes of each text, which are not copied, and their lengths."""
    pointers = ffi.new("uint8_t *[]", [ffi.from_buffer("uint8_t[]", text) for text in encoded])
    return pointers, ffi.new("uintptr_t[]", [len(text) for text in encoded])


def _take_rows(rows: Any, num: int) -> list[list[int]]:
    length = ffi.new("uintptr_t *")
    try:
        return [ffi.unpack(lib.rustbpe_row(rows, i, length), length[0]) for i in range(num)]
    finally:
        lib.rustbpe_rows_free(rows)


def _num_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
