"""
Speculative decoding without a second model: drafts of the next tokens of a sequence, for engine.py.

A decode step that reads a few more tokens takes hardly longer where it waits for the weights or for kernels to start.
So the engine guesses ("drafts") the next tokens, reads them together with the current one, samples at each position,
and keeps the samples up to the first that differs from its draft (speculative decoding, arXiv 2211.17192). The draft is
looked up: where the sequence last contained its final n tokens, what followed them (as in arXiv 2304.04487).

The result is exact. In general a drafted token x is accepted with probability p(x), and on rejection another one is
drawn from p without x, renormalised. Drawing y from p, and accepting x if y = x, does both at once: y = x has the
probability p(x), and any other y has the distribution of the second draw. As y is drawn with the random number of its
position, a seed gives the same completion with and without drafts (up to rounding of the logits).
"""

from collections.abc import Iterable

NGRAM_LENGTHS = (3, 2)  # n, longest first


class Drafter:
    """The tokens of one sequence so far, with an index of its n-grams."""

    def __init__(self, tokens: Iterable[int]):
        self.tokens: list[int] = []
        self.following: dict[tuple[int, ...], int] = {}  # position after the last occurrence of an n-gram
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        for n in NGRAM_LENGTHS:
            if len(self.tokens) >= n:
                self.following[tuple(self.tokens[-n:])] = len(self.tokens)
        self.tokens.append(token)

    def draft(self, count: int) -> list[int]:
        """
        Guesses the next `count` tokens; none if the last ones have not occurred before. A repetition that is shorter
        than the draft continues.

        >>> Drafter([1, 2, 3, 4, 5, 1, 2]).draft(4)
        [3, 4, 5, 1]
        >>> Drafter([7, 8, 7, 8]).draft(5)
        [7, 8, 7, 8, 7]
        """
        for n in NGRAM_LENGTHS:
            start = self.following.get(tuple(self.tokens[-n:]))
            if start is not None:
                period = len(self.tokens) - start
                return [self.tokens[start + i % period] for i in range(count)]
        return []
