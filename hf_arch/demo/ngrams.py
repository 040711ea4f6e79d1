"""The baseline that a language model has to beat: an n-gram model with interpolated Kneser-Ney smoothing.

    p(word | context) = max(c(context word) - D, 0) / c(context) + D t(context) / c(context) * p(word | shorter context)

(Kneser and Ney 1995; in this form Chen and Goodman 1998, "An Empirical Study of Smoothing Techniques for Language
Modeling", section 2.7.) `c` counts occurrences for the longest grams, and for shorter ones the different words seen
before them; `t(context)` is the number of different words seen after it; `D` = n1 / (n1 + 2 n2), from the numbers of
grams counted once and twice. Below the single word stands the uniform distribution.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Level:
    """The counts of all grams of one length. A gram is one integer, its words being the digits."""

    length: int
    grams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray  # of the counts, for each context
    types: np.ndarray  # different words after each context
    discount: float


def count(grams: np.ndarray, length: int, vocab_size: int) -> Level:
    grams, counts = np.unique(grams, return_counts=True)
    contexts, first, types = np.unique(grams // vocab_size, return_index=True, return_counts=True)
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = once / (once + 2 * twice) if once and twice else 0.5
    return Level(length, grams, counts, contexts, np.add.reduceat(counts, first), types, float(discount))


def look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key among the sorted `keys`; 0 where it is not among them."""
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


class NGram:
    """Counts of `tokens`; `order` 2 is a bigram model, 3 a trigram model."""

    def __init__(self, tokens: np.ndarray, order: int, vocab_size: int):
        if vocab_size**order >= 2**63:
            raise ValueError(f"{order}-grams over {vocab_size} words do not fit in 64 bits; use a lower order.")
        self.order, self.vocab_size = order, vocab_size
        level = count(self.join(windows(tokens, order)), order, vocab_size)
        self.levels = [level]
        while level.length > 1:  # a shorter gram counts once for each different word before it
            shorter = level.grams % vocab_size ** (level.length - 1)
            level = count(shorter, level.length - 1, vocab_size)
            self.levels.insert(0, level)

    def join(self, words: np.ndarray) -> np.ndarray:
        """Rows of words -> one integer each."""
        return words @ self.vocab_size ** np.arange(words.shape[-1] - 1, -1, -1, dtype=np.int64)

    def probability(self, grams: np.ndarray) -> np.ndarray:
        """Of the last word of each row, given the `order` - 1 words before it."""
        probability = np.full(len(grams), 1 / self.vocab_size)
        for level in self.levels:
            gram = self.join(grams[:, self.order - level.length :])
            counts = look_up(level.grams, level.counts, gram)
            totals = look_up(level.contexts, level.totals, gram // self.vocab_size)
            types = look_up(level.contexts, level.types, gram // self.vocab_size)
            smoothed = np.maximum(counts - level.discount, 0) + level.discount * types * probability
            probability = np.where(totals > 0, smoothed / np.maximum(totals, 1), probability)
        return probability

    def loss(self, tokens: np.ndarray) -> float:
        """Nats per token, over all tokens but the first; the first stands for what would be before it."""
        padded = np.concatenate((np.repeat(tokens[:1], self.order - 2), tokens))
        return float(-np.log(self.probability(windows(padded, self.order))).mean())


def windows(tokens: np.ndarray, length: int) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(np.asarray(tokens, dtype=np.int64), length)
